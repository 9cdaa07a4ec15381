from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_program_in_the_readme_is_the_example_that_is_tested() -> None:
    example = (ROOT / "examples" / "own_network.py").read_text()
    code = example.split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()
