"""On-demand transforms: features computed at the moment of the request, from features and what the request brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from featserve.definitions.code import Code, Function, capture
from featserve.definitions.field import Field
from featserve.definitions.rules import Json, check_chosen, check_name, check_tags, check_version, content_hash, unique
from featserve.definitions.view import FeatureView, Selection
from featserve.errors import DefinitionError, hint
from featserve.types import Type, parse_type

Nulls = Literal["strict", "pass"]


@dataclass(frozen=True, slots=True)
class RequestColumn:
    """A typed column that the request itself brings, and a training frame's labels must have."""

    name: str
    type: Type

    def __post_init__(self) -> None:
        check_name("request column", self.name)
        if not isinstance(self.type, Type):
            raise DefinitionError(f"request column {self.name!r}: {self.type!r} is not a type such as Float32")


@dataclass(frozen=True, slots=True)
class RequestTime:
    """The instant T that is asked for: the request's online, each label row's own in a training frame."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Some outputs of one transform, in order: what ``transform["a", "b"]`` makes and a FeatureService holds."""

    transform: OnDemandTransform
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_chosen(f"transform {self.transform.name!r}", "output", self.names)
        for name in self.names:
            self.transform.output(name)


Input = Selection | Outputs | RequestColumn | RequestTime


@dataclass(frozen=True, slots=True)
class OnDemandTransform:
    """A pure, row-wise NumPy function of declared inputs to declared outputs. Made by ``on_demand_transform``.

    ``inputs``: for each parameter of the function where its values come from. ``code`` is what runs, online and
    offline: captured when the file was loaded, and never read from the file again.
    """

    name: str
    inputs: Mapping[str, Input]
    outputs: Sequence[Field]
    code: Code
    _: KW_ONLY
    nulls: Nulls = "strict"
    version: int = 1
    owner: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("transform", self.name)
        what = f"transform {self.name!r}"
        check_version(what, self.version)
        if self.nulls not in ("strict", "pass"):
            raise DefinitionError(f"{what}: nulls {self.nulls!r} is neither 'strict' nor 'pass'")
        if not isinstance(self.inputs, Mapping) or not self.inputs:
            raise DefinitionError(
                f"{what}: inputs maps each parameter to view['feature'], a RequestColumn or RequestTime()"
            )
        inputs = {name: self._input(what, name, given) for name, given in self.inputs.items()}
        outputs = tuple(self.outputs) if isinstance(self.outputs, Iterable) else ()
        if not outputs or not all(isinstance(f, Field) for f in outputs):
            raise DefinitionError(f"{what}: outputs is a list of at least one Field")
        unique(what, "output", [f.name for f in outputs])
        for f in outputs:
            if f.constrained:
                raise DefinitionError(f"{what}: output {f.name!r}: constraints are for rows that are written")
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "outputs", outputs)
        object.__setattr__(self, "tags", check_tags(what, self.tags))

    @staticmethod
    def _input(what: str, name: str, given: object) -> Input:
        check_name(f"{what}: parameter", name)
        if isinstance(given, OnDemandTransform) and len(given.outputs) == 1:
            return given[given.outputs[0].name]
        if isinstance(given, Selection | Outputs):
            if len(given.names) != 1:
                raise DefinitionError(
                    f"{what}: input {name!r} is {len(given.names)} features; it takes one, view['feature']"
                )
            return given
        if isinstance(given, RequestColumn | RequestTime):
            return given
        raise DefinitionError(
            f"{what}: input {name!r} is {given!r}; it takes view['feature'], a RequestColumn or RequestTime()"
        )

    def __getitem__(self, names: str | tuple[str, ...]) -> Outputs:
        """Choose some of the outputs for a service, or one as the input of another transform."""
        return Outputs(self, (names,) if isinstance(names, str) else names)

    def output(self, name: str) -> Field:
        for f in self.outputs:
            if f.name == name:
                return f
        raise DefinitionError(
            f"transform {self.name!r} has no output {name!r}{hint(name, [f.name for f in self.outputs])}"
        )

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def sources(self) -> tuple[FeatureView | OnDemandTransform, ...]:
        """The views and transforms that its inputs come from."""
        found = [
            i.view if isinstance(i, Selection) else i.transform
            for i in self.inputs.values()
            if isinstance(i, Selection | Outputs)
        ]
        return tuple({source.id: source for source in found}.values())

    def to_dict(self) -> Json:
        return self.meaning() | {
            "outputs": [f.to_dict() for f in self.outputs],
            "owner": self.owner,
            "description": self.description,
            "tags": dict(self.tags),
        }

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "version": self.version,
            "inputs": {name: _input_to_dict(given) for name, given in self.inputs.items()},
            "outputs": [f.meaning() for f in self.outputs],
            "nulls": self.nulls,
            "code": {"entry": self.code.entry, "modules": dict(self.code.modules)},
        }

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(
        cls, d: Json, views: Mapping[str, FeatureView], transforms: Mapping[str, OnDemandTransform]
    ) -> OnDemandTransform:
        """Rebuild from ``to_dict``, with views and transforms by ``name@version``."""
        return cls(
            d["name"],
            {name: _input_from_dict(given, views, transforms) for name, given in d["inputs"].items()},
            [Field.from_dict(f) for f in d["outputs"]],
            Code(d["code"]["entry"], d["code"]["modules"]),
            nulls=d["nulls"],
            version=d["version"],
            owner=d["owner"],
            description=d["description"],
            tags=d["tags"],
        )


def on_demand_transform(
    *,
    inputs: Mapping[str, Input | OnDemandTransform],
    outputs: Sequence[Field],
    nulls: Nulls = "strict",
    version: int = 1,
    name: str | None = None,
    owner: str = "",
    description: str = "",
    tags: Mapping[str, str] | None = None,
) -> Callable[[Function], OnDemandTransform]:
    """Declare a module-level function as an on-demand transform.

    The function is called with one NumPy array of shape (n,) for each parameter ((n, length) for a vector): bool,
    int32, int64, float32, float64, ``StringDType`` for string, object for bytes, ``datetime64[us]`` for timestamps. It
    returns an array of length n of exactly the declared dtype, or a mapping of them by output name; a NaT is a null.
    It is row-wise: row i of the answer depends on row i alone, to the last bit, so that a matrix product, whose sums
    round by the number of rows, is refused. It is pure: no clock, no chance, no file. Inputs are read-only.

    ``nulls``: "strict" gives null outputs for a row with any null input, and the function never sees that row. "pass"
    also calls it with ``valid``, a mapping of each parameter to a bool array, False where the value is null; there it
    is NaN, zero or empty. A feature that declares a default is never null. An output may be a pair of an array and
    such a mask.

    Its code is captured now: the function, and what it uses of the project, by name, from module level.
    """

    def declare(function: Function) -> OnDemandTransform:
        code = capture(function)
        expected = [*inputs, *(["valid"] if nulls == "pass" else [])]
        count = function.__code__.co_argcount + function.__code__.co_kwonlyargcount
        parameters = function.__code__.co_varnames[:count]
        if sorted(parameters) != sorted(expected):
            raise DefinitionError(
                f"transform {code.entry!r}: the function takes {', '.join(parameters) or 'nothing'}, its declared "
                f"inputs are {', '.join(expected)}; they have the same names"
            )
        doc = description or (function.__doc__ or "").strip().partition("\n")[0]
        return OnDemandTransform(
            name or code.entry, inputs, outputs, code,  # type: ignore[arg-type]
            nulls=nulls, version=version, owner=owner, description=doc, tags=tags or {},
        )  # fmt: skip

    return declare


def _input_to_dict(given: Input) -> Json:
    match given:
        case Selection(view, names):
            return {"view": view.name, "version": view.version, "hash": view.hash, "name": names[0]}
        case Outputs(transform, names):
            return {"transform": transform.name, "version": transform.version, "hash": transform.hash, "name": names[0]}
        case RequestColumn(name, type_):
            return {"request": name, "type": str(type_)}
        case _:
            return {"request_time": True}


def _input_from_dict(d: Json, views: Mapping[str, FeatureView], transforms: Mapping[str, OnDemandTransform]) -> Input:
    if "view" in d:
        return Selection(views[f"{d['view']}@{d['version']}"], (d["name"],))
    if "transform" in d:
        return Outputs(transforms[f"{d['transform']}@{d['version']}"], (d["name"],))
    return RequestColumn(d["request"], parse_type(d["type"])) if "request" in d else RequestTime()
