"""Python that makes a model again and loads a weight file into it, for a person to copy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from normwise.record import Record
from normwise.weight_files import NOTE, SAFETENSORS


@dataclass(frozen=True)
class Code:
    """Python, and the imports that it needs."""

    text: str
    imports: tuple[str, ...] = ()


def calling(spec: str) -> Code:
    """The call of what `module:attribute` names.

    >>> calling("zoo.nets:Resnet.small")
    Code(text='Resnet.small()', imports=('from zoo.nets import Resnet',))
    """
    module, _, path = spec.partition(":")
    return Code(f"{path}()", (f"from {module} import {path.partition('.')[0]}",))


def operation(name: str, arguments: Sequence[Code], options: Mapping[str, Any]) -> Code:
    """The call of an operation, and the model that comes of it.

    >>> operation("fold", [Code("make()")], {"steps": ["gain"]})
    Code(text="nw.fold(make(), steps=['gain']).model", imports=('import normwise as nw',))
    """
    texts = [argument.text for argument in arguments] + [f"{key}={value!r}" for key, value in options.items()]
    imports = [line for argument in arguments for line in argument.imports]
    return Code(f"nw.{name}({', '.join(texts)}).model", ("import normwise as nw", *imports))


def assigned(made: Code) -> Code:
    """The same as a statement: the model has a name then."""
    return Code(f"model = {made.text}", made.imports)


def prepared(make: Code, out: Path, then: Code) -> Code:
    """Statements that make a model, load into it what fits of a file, and then do `then`, which speaks of `model`."""
    reading = _reading(out)
    lines = f"model = {make.text}\nmodel.load_state_dict({reading.text}, strict=False)\nmodel = {then.text}"
    return Code(lines, (*make.imports, *then.imports, *reading.imports))


def to_load(out: Path, made: Code) -> list[str]:
    """Lines of Python that load a file into the model that it belongs to."""
    reading = _reading(out)
    imports = sorted({*made.imports, *reading.imports}, key=lambda line: (line.startswith("from"), line))
    return [*imports, *made.text.splitlines(), f"model.load_state_dict({reading.text})"]


def _reading(path: Path) -> Code:
    if path.suffix == SAFETENSORS:
        return Code(f"load_file({str(path)!r})", ("from safetensors.torch import load_file",))
    return Code(f"torch.load({str(path)!r}, weights_only=True)", ("import torch",))


def note(record: Record, made: Code | None) -> dict[str, str]:
    """What a file of weights says of the operation that it comes from."""
    said = {
        "operation": record.operation,
        "version": metadata.version("normwise"),
        "imports": [] if made is None else list(made.imports),
        "python": "" if made is None else made.text,
        "changed": {line.path: line.after for line in record.changed},
    }
    return {NOTE: json.dumps(said)}
