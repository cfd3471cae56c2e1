"""Names that scripts for SGLang's frontend import from its ``lang.ir``."""

from __future__ import annotations

from ..types import SamplingParams
from .expr import Expr, Gen, Select

__all__ = [
    "REGEX_BOOL",
    "REGEX_FLOAT",
    "REGEX_INT",
    "REGEX_STR",
    "SglExpr",
    "SglGen",
    "SglSamplingParams",
    "SglSelect",
]

REGEX_INT = r"[-+]?[0-9]+[ \n]*"
REGEX_FLOAT = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
REGEX_BOOL = r"(True|False)"
REGEX_STR = r"\"[\w\d\s]*\""

SglExpr = Expr
SglGen = Gen
SglSelect = Select
SglSamplingParams = SamplingParams
