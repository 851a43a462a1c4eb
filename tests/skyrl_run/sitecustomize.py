"""Any Python that starts here: SkyRL gives pydantic `typing.TypedDict`, which pydantic takes from Python 3.12 on."""

import typing

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict
