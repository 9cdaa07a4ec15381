"""What all settings models share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SEED_LIMIT = 2**32  # per-image generators take 32-bit seeds (the limit of diffusion.noise)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Probability = Annotated[float, Field(ge=0, lt=1)]
EmaStd = Annotated[float, Field(gt=0, le=0.28)]
Precision = Literal["float32", "bfloat16", "float16"]
Omega = Annotated[float, Field(ge=-1, le=20)]


class Settings(BaseModel):
    """Base of every settings model: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
