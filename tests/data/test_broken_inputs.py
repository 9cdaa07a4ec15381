"""Broken and hostile inputs: each is refused in one sentence that names it, and leaves nothing behind."""

import gzip
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import (
    binary_batch,
    edm_zip,
    index,
    make_tar,
    make_zip,
    npy,
    parquet,
    pickled_batch,
    pickled_meta,
    pixels,
    png,
    stack,
    webdataset,
)  # fmt: skip
from hostile import (
    BATCH,
    IMAGE,
    Make,
    array,
    bomb,
    changed,
    claims,
    cut,
    damaged_header,
    header_of,
    long_name,
    mixed_folder,
    npz,
    overlapping,
    png_of,
    tar_entry,
    tarred,
    tars_with_cifar,
    twice_in_zip,
    two_tars,
    zip_entry,
    zipped,
)  # fmt: skip

from sims_ray.data import archives, arrays, importers
from sims_ray.data.entries import Source
from sims_ray.data.importers import import_images
from sims_ray.errors import SimsError

LATENTS = np.zeros((3, 4, 8, 8), np.float32)
NAN = np.where(np.arange(3)[:, None, None, None] == 2, np.nan, LATENTS).astype(np.float32)
TWO = [("0.png", IMAGE), ("1.png", IMAGE)]
BROKEN: dict[str, tuple[str, Make, str]] = {
    # zip
    "zip: cut off": ("in.zip", cut(zipped(*TWO), 0.6), "in.zip is no whole zip"),
    "zip: not one": ("in.zip", lambda path: path.write_bytes(b"hello"), "in.zip is no whole zip"),
    "zip: empty": ("in.zip", zipped(), "in.zip holds no images"),
    "zip: no images": ("in.zip", zipped(("readme.txt", b"hello")), "in.zip holds no images"),
    "zip: leads out": ("in.zip", zipped(("a/../../0.png", IMAGE)), "a/../../0.png, which leads out"),
    "zip: leads out on Windows": ("in.zip", zipped(("..\\0.png", IMAGE)), r"0.png, which leads out"),
    "zip: absolute": ("in.zip", zipped(("/etc/0.png", IMAGE)), "in.zip has the member /etc/0.png, which leads out"),
    "zip: absolute on Windows": ("in.zip", zipped(("C:0.png", IMAGE)), "C:0.png, which leads out"),
    "zip: link": ("in.zip", zip_entry("0.png", external_attr=0o120777 << 16), "in.zip: 0.png is a link"),
    "zip: device": ("in.zip", zip_entry("0.png", external_attr=0o060777 << 16), "in.zip: 0.png is a link or a device"),
    "zip: encrypted": ("in.zip", zip_entry("0.png", flag_bits=1), "in.zip: 0.png is encrypted"),
    "zip: bzip2": ("in.zip", zipped(("0.png", IMAGE), method=zipfile.ZIP_BZIP2), "0.png is compressed by method 12"),
    "zip: bomb": (
        "in.zip",
        zipped(("0.png", IMAGE), ("1.bmp", bytes(8 << 20)), method=zipfile.ZIP_DEFLATED),
        "in.zip: 1.bmp claims 8388608 bytes in",
    ),
    "zip: claims 4 GB": ("in.zip", zip_entry("0.png", file_size=0xFFFFFFF0), "in.zip: 0.png claims 4294967280 bytes"),
    "zip: overlap": ("in.zip", overlapping, "in.zip has members that overlap"),
    "zip: twice": ("in.zip", twice_in_zip, "in.zip: a/0.png is there twice"),
    "zip: twice but for the separator": ("in.zip", zipped(("a/0.png", IMAGE), ("a\\0.png", IMAGE)), "is there twice"),
    "zip: wrong checksum": ("in.zip", changed(zipped(("0.png", IMAGE)), IMAGE[40:44], b"abcd"), "in.zip: 0.png is no"),
    "zip: claims too much": ("in.zip", zip_entry("0.png", file_size=len(IMAGE) + 9), r"0.png has \d+ bytes of"),
    "zip: cut image": ("in.zip", zipped(("0.png", IMAGE), ("1.png", IMAGE[:90])), "in.zip: 1.png is not a readable"),
    "zip: line break in a name": ("in.zip", zipped(("a\nb.png", IMAGE[:90])), r"in.zip: 'a\\nb.png' is not a readable"),
    "zip: two sizes": ("in.zip", zipped(TWO[0], ("b.png", png(pixels(0, 9, 9)))), "0.png is 8x8 but .*in.zip: b.png"),
    "zip: index is no JSON": ("in.zip", zipped(*TWO, ("dataset.json", b"{")), "in.zip: dataset.json is not JSON"),
    "zip: index lists the absent": (
        "in.zip",
        zipped(*TWO, ("dataset.json", index([["0.png", 0], ["1.png", 1], ["gone.png", 1]]))),
        "in.zip: dataset.json names gone.png, which is not there",
    ),
    "zip: index omits": ("in.zip", zipped(*TWO, ("dataset.json", index([["0.png", 0]]))), "no entry for 1.png"),
    "zip: index leads out": ("in.zip", zipped(*TWO, ("dataset.json", index([["../0.png", 0]]))), "../0.png, outside"),
    "zip: index label": ("in.zip", zipped(("0.png", IMAGE), ("dataset.json", index([["0.png", 1.5]]))), "label 1.5"),
    "zip: index label text": (
        "in.zip",
        zipped(("0.png", IMAGE), ("dataset.json", index([["0.png", "c\nat"]]))),
        "dataset.json: 0.png has label 'c.*nat'",
    ),
    "zip: index in a folder": ("in.zip", zipped(("a/dataset.json", b"{}"), ("a/0.png", IMAGE)), "a/dataset.json lies"),
    "zip: image of many pixels": ("in.zip", zipped(("0.png", png_of(60000, 60000))), "in.zip: 0.png claims to have"),
    "zip: latents and images": ("in.zip", zipped(("0.npy", npy(LATENTS[0])), ("1.npy", npy(pixels(0)))), "0.npy is of"),
    "zip: latents of two shapes": (
        "in.zip",
        zipped(("0.npy", npy(LATENTS[0])), ("1.npy", npy(LATENTS[0, :, :4, :4]))),
        "0.npy is 8x8x4 but .*1.npy is 4x4x4",
    ),
    "zip: cut array": ("in.zip", zipped(("0.npy", npy(LATENTS[0])[:-5])), "in.zip: 0.npy has 1147 bytes but"),
    "zip: array of arrays": ("in.zip", zipped(("0.npy", npy(LATENTS))), r"in.zip: 0.npy is float32 \[1, 3, 4, 8, 8\]"),
    # tar
    "tar: not one": ("in.tar", lambda path: path.write_bytes(b"hello" * 500), "in.tar is no whole tar"),
    "tar: empty": ("in.tar", tarred(), "in.tar holds no images"),
    "tar: no images": ("in.tar", tarred(("readme.txt", b"hello")), "in.tar holds no images"),
    "tar: cut in a member": ("in.tar", cut(tarred(("0.png", bytes(20000))), 0.4), "in.tar"),
    "tar: cut between members": (
        "in.tar",
        lambda path: (make_tar(path, TWO), path.write_bytes(path.read_bytes()[:1024])),
        "in.tar is no whole tar after 0.png",
    ),
    "tar: damaged header": ("in.tar", damaged_header, "in.tar is no whole tar after 0.png"),
    "tar.gz: cut off": ("in.tar.gz", cut(lambda path: webdataset(path, stack(40), None), 0.7), "in.tar.gz is no whole"),
    "tar.gz: wrong checksum": (
        "in.tar.gz",
        lambda path: (make_tar(path, TWO), path.write_bytes(path.read_bytes()[:-8] + bytes(8))),
        "in.tar.gz is no whole tar after start .CRC check failed",
    ),
    "tar.gz: of something else": ("in.tgz", lambda p: p.write_bytes(gzip.compress(b"hello")), "in.tgz is no whole tar"),
    "tar.gz: bomb": ("in.tar.gz", bomb, "in.tar.gz expands more than 500-fold"),
    "tar: two in one": ("in.tar", two_tars, "in.tar goes on after its end"),
    "tar: leads out": ("in.tar", tarred(("../0.png", IMAGE)), "in.tar has the member ../0.png, which leads out"),
    "tar: absolute": ("in.tar", tarred(("/0.png", IMAGE)), "in.tar has the member /0.png, which leads out"),
    "tar: symbolic link": (
        "in.tar",
        tar_entry("1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "in.tar: 1.png is a link",
    ),
    "tar: hard link": ("in.tar", tar_entry("1.png", type=tarfile.LNKTYPE, linkname="0.png"), "in.tar: 1.png is a link"),
    "tar: device": ("in.tar", tar_entry("1.png", type=tarfile.CHRTYPE), "in.tar: 1.png is a link, a device"),
    "tar: pipe": ("in.tar", tar_entry("1.png", type=tarfile.FIFOTYPE), "in.tar: 1.png is a link, a device"),
    "tar: claims 1 GB": ("in.tar", tar_entry("1.png", size=1 << 30), "in.tar.*1.png claims 1073741824 bytes"),
    "tar: claims 8 GB elsewhere": (
        "in.tar",
        tar_entry("1.png", pax_headers={"size": str(8 << 30)}),
        "in.tar: 1.png has 8589934592 bytes",
    ),
    "tar: long name": ("in.tar", long_name, "claims 67108864 bytes"),
    "tar: twice": ("in.tar", tarred(*TWO, ("./0.png", IMAGE)), "in.tar: 0.png is there twice"),
    # WebDataset
    "web: key in two places": ("in.tar", tarred(*TWO, ("0.cls", b"1")), "in.tar: 0 comes in two places"),
    "web: two images": ("in.tar", tarred(("0.png", IMAGE), ("0.jpg", IMAGE)), "in.tar: 0.jpg is a second image"),
    "web: no image": ("in.tar", tarred(("0.png", IMAGE), ("1.cls", b"1")), "in.tar: 1 has no image"),
    "web: cut image": ("in.tar", tarred(("0.png", IMAGE), ("1.png", IMAGE[:90])), "in.tar: 1.png is not a readable"),
    "web: label text": ("in.tar", tarred(("0.cls", b"cat"), ("0.png", IMAGE)), "in.tar: 0.cls has label 'cat'"),
    "web: label too large": ("in.tar", tarred(("0.cls", b"2147483648"), ("0.png", IMAGE)), "0.cls has label 2147"),
    "web: label -2": ("in.tar", tarred(("0.json", b'{"label": -2}'), ("0.png", IMAGE)), "0.json has label -2"),
    "web: label true": ("in.tar", tarred(("0.json", b'{"label": true}'), ("0.png", IMAGE)), "0.json has label True"),
    "web: no JSON": ("in.tar", tarred(("0.json", b"{"), ("0.png", IMAGE)), "in.tar: 0.json is no JSON object"),
    "web: label of 2 MB": ("in.tar", tarred(("0.json", bytes(2 << 20)), ("0.png", IMAGE)), "0.json has 2097152 bytes"),
    "web: beside images": ("in", mixed_folder, "holds both a.tar and 0.png"),
    # arrays
    "npy: objects": ("in.npy", array(np.array([{}, 1]), allow_pickle=True), "in.npy holds pickled objects"),
    "npy: cut off": ("in.npy", cut(array(stack(4)), 0.9), r"in.npy has \d+ bytes but its header claims 896"),
    "npy: too long": ("in.npy", lambda path: header_of(path, npy(stack(1))[10:128], more=bytes(193)), "in.npy has 321"),
    "npy: empty file": ("in.npy", lambda path: path.touch(), "in.npy is no readable array"),
    "npy: no rows": ("in.npy", array(np.zeros((0, 8, 8, 3), np.uint8)), "in.npy holds no images"),
    "npy: header is code": ("in.npy", claims("__import__('os').abort()\n"), "in.npy is no readable array"),
    "npy: header is deep": ("in.npy", claims("(" * 9000), "in.npy is no readable array"),
    "npy: header is long": ("in.npy", claims("{}", version=b"\x02\x00"), "in.npy is npy of version 2.0"),
    "npy: claims a terabyte": (
        "in.npy",
        claims("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1024, 1024, 3)}\n"),
        "in.npy has 86 bytes but its header claims 3145728000086",
    ),
    "npy: shape -1": ("in.npy", claims("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8)}\n"), r"-1, 8, 8"),
    "npy: by column": ("in.npy", array(np.asfortranarray(stack(3))), "in.npy lies column by column"),
    "npy: four channels": ("in.npy", array(np.zeros((3, 8, 8, 4), np.uint8)), "neither 1 nor 3 channels"),
    "npy: flat rows": ("in.npy", array(np.zeros((3, 192), np.uint8)), r"in.npy is uint8 \[3, 192\]"),
    "npy: int16": ("in.npy", array(np.zeros((3, 8, 8, 3), np.int16)), "in.npy is int16"),
    "npy: float64": ("in.npy", array(LATENTS.astype(np.float64)), "in.npy is float64"),
    "npy: float images": ("in.npy", array(np.zeros((3, 8, 8, 3), np.float32)), "row 0 is 3x8x8, not square"),
    "npy: not square": ("in.npy", array(np.zeros((3, 8, 9, 3), np.uint8)), "in.npy row 0 is 9x8, not square"),
    "npy: NaN": ("in.npy", array(NAN), "in.npy row 2 has the value nan, which float16"),
    "npz: no arrays": ("in.npz", npz(), "in.npz holds nothing"),
    "npz: other arrays": ("in.npz", npz(pictures=stack(2)), "in.npz holds pictures"),
    "npz: two of images": ("in.npz", npz(x=stack(2), images=stack(2)), "exactly one of the arrays images, arr_0, x"),
    "npz: objects": ("in.npz", npz(images=np.array([{}, 1])), "in.npz: images.npy holds pickled objects"),
    "npz: cut off": ("in.npz", cut(npz(images=stack(9)), 0.5), "in.npz is no whole zip"),
    "npz: fewer labels": (
        "in.npz",
        npz(images=stack(3), labels=[0, 1]),
        "images.npy has 3 rows but there are 2 labels",
    ),
    "npz: label -2": ("in.npz", npz(x=stack(2), y=[0, -2]), "in.npz: y.npy row 1 has label -2"),
    "npz: label too large": ("in.npz", npz(x=stack(2), y=[0, 2**31]), "in.npz: y.npy row 1 has label 2147483648"),
    "npz: labels are floats": ("in.npz", npz(x=stack(2), y=[0.0, 1.0]), r"y.npy is float64 \[2\]; give whole numbers"),
    "npz: labels are one-hot": ("in.npz", npz(x=stack(2), y=np.eye(2, dtype=int)), r"y.npy is int64 \[2, 2\]"),
    "npz: latent is NaN": ("in.npz", npz(x=NAN), "in.npz: x.npy row 2 has the value nan"),
    "npz: latent is infinite": ("in.npz", npz(x=LATENTS.astype("f2") + np.inf), "x.npy row 0 has the value inf"),
    "npz: latent too large": ("in.npz", npz(x=LATENTS - 70000), "row 0 has the value -70000.0, which float16"),
    # CIFAR-10
    "cifar: gap": ("in.tar", tarred(("data_batch_1", BATCH), ("data_batch_3", BATCH)), "has data_batch_3 but not all"),
    "cifar: both versions": (
        "in.tar",
        tarred(("a/data_batch_1", BATCH), ("b/data_batch_1.bin", binary_batch(stack(1, side=32), [0]))),
        "in.tar: b/data_batch_1.bin is there as a/data_batch_1",
    ),
    "cifar: unknown global": (
        "in.tar",
        tarred(("data_batch_1", b"\x80\x02cos\nsystem\nU\x04true\x85R.")),
        "in.tar: data_batch_1 names the global os.system, which no CIFAR-10 batch contains",
    ),
    "cifar: unknown instruction": (
        "in.tar",
        tarred(("data_batch_1", b"\x80\x02U\x01a\x82\x01.")),
        "in.tar: data_batch_1 has the pickle instruction EXT1",
    ),
    "cifar: pickle of protocol 0": ("in.tar", tarred(("data_batch_1", b"(dp0\n.")), "data_batch_1 has the pickle"),
    "cifar: cut pickle": ("in.tar", tarred(("data_batch_1", BATCH[:-4000])), "in.tar: data_batch_1 cannot be read"),
    "cifar: no batch": ("in.tar", tarred(("data_batch_1", pickled_meta(["a"]))), "data_batch_1 has no `data` and"),
    "cifar: bytes for other shape": (
        "in.tar",
        tarred(("data_batch_1", BATCH.replace(b"J\x00\x0c\x00\x00\x86", b"J\x01\x0c\x00\x00\x86"))),
        "data_batch_1 has images whose bytes do not make up",
    ),
    "cifar: label 10": (
        "in.tar",
        tarred(("data_batch_1", pickled_batch(stack(2, side=32), [3, 10]))),
        "in.tar: data_batch_1 image 1 has label 10",
    ),
    "cifar: fewer labels": (
        "in.tar",
        tarred(("data_batch_1", pickled_batch(stack(2, side=32), [3]))),
        "in.tar: data_batch_1 has 2 images but not",
    ),
    "cifar: label 200": (
        "in.tar",
        tarred(("data_batch_1.bin", binary_batch(stack(2, side=32), [3, 200]))),
        "in.tar: data_batch_1.bin image 1 has label 200",
    ),
    "cifar: cut batch": (
        "in.tar",
        tarred(("data_batch_1.bin", binary_batch(stack(2, side=32), [3, 2])[:-1])),
        "in.tar: data_batch_1.bin has 6145 bytes, no multiple of 3073",
    ),
    "cifar: empty batch": ("in.tar", tarred(("data_batch_1.bin", b"")), "in.tar holds no images"),
    "cifar: three class names": (
        "in.tar",
        tarred(("batches.meta.txt", b"a b c"), ("data_batch_1", BATCH)),
        "in.tar: batches.meta.txt does not name 10 classes",
    ),
    "cifar: two tars": ("in", tars_with_cifar, "holds a.tar, which is CIFAR-10, and other tar files"),
    # the rest
    "Parquet: path without bytes": (
        "in.parquet",
        lambda path: parquet(path, image=[{"bytes": IMAGE, "path": None}, {"bytes": None, "path": "/etc/passwd"}]),
        "in.parquet row 1 has no image bytes",
    ),
    "unknown kind": ("in.rar", lambda path: path.write_bytes(b"Rar!"), "in.rar is neither a folder nor a file of a"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_input_is_refused_in_a_sentence_and_leaves_nothing(tmp_path: Path, broken: str) -> None:
    name, make, message = BROKEN[broken]
    make(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SimsError, match=message) as refusal:
        import_images(tmp_path / name, tmp_path / "out")
    said = str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert name in said and said.isprintable() and len(said) < 400
    assert not re.search(r"\.\s+[A-Z]", said)  # one sentence


SOUND: dict[str, Make] = {
    "in.zip": lambda path: edm_zip(path, stack(3), [0, 1, 2]),
    "in.tar": lambda path: webdataset(path, stack(3), [0, 1, 2]),
    "in.tar.gz": lambda path: webdataset(path, stack(3), [0, 1, 2]),
    "cifar.tar": tarred(("data_batch_1", pickled_batch(stack(1, side=32), [1]))),
    "in.npz": npz(images=stack(3), labels=[0, 1, 2]),
    "in.npy": array(LATENTS),
    "in.parquet": lambda path: parquet(path, image=[IMAGE] * 3, label=[0, 1, 2]),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_file_changed_at_random_is_imported_or_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    SOUND[name](tmp_path / name)
    sound, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(60):
        content = bytearray(sound)
        for at in rng.choice([700, len(content)]) - rng.integers(0, 700, rng.integers(1, 4)):  # near either end
            content[at % len(content)] = rng.integers(256)
        (tmp_path / name).write_bytes(content[: rng.integers(len(content))] if i % 4 == 0 else content)
        try:
            import_images(tmp_path / name, tmp_path / f"out{i}")
        except SimsError as error:
            refused += 1
            assert name in str(error) and str(error).isprintable() and not (tmp_path / f"out{i}").exists()
    assert 10 < refused <= 60
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("options", [{"size": 8}, {"grey": True}])
def test_latents_are_not_resized_or_made_grey(tmp_path: Path, options: dict[str, Any]) -> None:
    np.save(tmp_path / "in.npy", LATENTS)
    with pytest.raises(SimsError, match=r"in.npy row 0 is a latent, which cannot be resized"):
        import_images(tmp_path / "in.npy", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


def test_members_and_rows_beyond_the_limits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MEMBER_BYTES", len(IMAGE) - 1)
    monkeypatch.setattr(archives.CheckedZip.read, "__defaults__", (len(IMAGE) - 1,))
    monkeypatch.setattr(arrays, "ROW_BYTES", 191)
    make_zip(tmp_path / "in.zip", dict(TWO))
    make_tar(tmp_path / "in.tar", TWO)
    np.save(tmp_path / "in.npy", stack(1))
    for name in ("in.zip: 0.png has", "0.png claims", "in.npy has rows of 192 bytes"):
        source = tmp_path / ("in.tar" if "claims" in name else name.split(" ")[0].rstrip(":"))
        with pytest.raises(SimsError, match=name):
            import_images(source, tmp_path / "out")


def test_an_image_damaged_after_the_first_look_leaves_nothing(tmp_path: Path) -> None:
    members = [(f"{i}.png", png(pixels(i))) for i in range(3)]
    make_tar(tmp_path / "in.tar", [*members[:2], ("2.png", members[2][1][:-30])])
    with pytest.raises(SimsError, match=r"in.tar: 2.png is not a readable image"):
        import_images(tmp_path / "in.tar", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tar"]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = edm_zip(tmp_path / "in.zip", stack(3), None)
    entries = list(importers.find_source(source).entries())
    passes = iter([entries, entries[:2]])
    changing = Source(source, lambda: iter(next(passes)), None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SimsError, match=r"in.zip has changed while it was read"):
        patch.setattr(importers, "find_source", lambda path: changing)
        import_images(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
