"""Feature services: what one model asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from featserve.definitions.field import Field
from featserve.definitions.rules import (
    Json,
    check_name,
    check_tags,
    check_texts,
    check_version,
    content_hash,
    unique,
)
from featserve.definitions.transform import OnDemandTransform, Outputs, RequestColumn
from featserve.definitions.view import FeatureView, Selection
from featserve.errors import DefinitionError
from featserve.types import Float32, Float64, Type, parse_type


@dataclass(frozen=True, slots=True)
class FeatureService:
    """What one model asks for: features of view versions and outputs of transforms, in order, as one vector.

    ``features``: views and transforms (all of their features), or some of them (``view["a", "b"]``). ``dtype``: Float32
    or Float64, the precision of the served tensor. Features that it holds are floats (rounded to it), bools, vectors
    and, for Float64, int32; strings, bytes, timestamps and integers that would lose bits are served as typed columns
    beside it. Feature names in answers and training frames are ``view.feature`` and ``transform.output``.
    """

    name: str
    features: Sequence[FeatureView | Selection | OnDemandTransform | Outputs]
    _: KW_ONLY
    dtype: Type = Float32
    version: int = 1
    owner: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("feature service", self.name)
        what = f"feature service {self.name!r}"
        check_version(what, self.version)
        if self.dtype not in (Float32, Float64):
            raise DefinitionError(f"{what}: dtype {self.dtype!r} is neither Float32 nor Float64")
        check_texts(what, owner=self.owner, description=self.description)
        items = self.features if isinstance(self.features, Iterable) else ()
        chosen = _merged([_chosen(what, item) for item in items])
        if not chosen:
            raise DefinitionError(f"{what}: features is a list of at least one view, transform or selection of one")
        object.__setattr__(self, "features", chosen)
        object.__setattr__(self, "tags", check_tags(what, self.tags))
        unique(what, "feature", [name for name, _, _ in self.fields])
        named: dict[str, FeatureView | OnDemandTransform] = {}
        for source in _sources(chosen):
            if named.setdefault(source.name, source) != source:
                raise DefinitionError(
                    f"{what}: two definitions of {source.name!r}: {named[source.name].id} and {source.id}"
                )
        if not self.views:
            raise DefinitionError(f"{what}: it reads no feature view, so no key says how many rows a request is for")
        columns: dict[str, tuple[Type, str]] = {}
        for view in self.views:
            for key, type_ in view.entity.keys.items():
                _one_type(what, "key column", columns, key, type_, view.id)
        keys = set(columns)
        for transform in self.transforms:
            for given in transform.inputs.values():
                if isinstance(given, RequestColumn):
                    if given.name in keys:
                        raise DefinitionError(
                            f"{what}: request column {given.name!r} of {transform.id} is also a key column"
                        )
                    _one_type(what, "request column", columns, given.name, given.type, transform.id)

    @property
    def fields(self) -> tuple[tuple[str, Field, FeatureView | OnDemandTransform], ...]:
        """Every feature in order: its full name, its field, and the view or transform that it is of."""
        found: list[tuple[str, Field, FeatureView | OnDemandTransform]] = []
        for item in self.features:
            if isinstance(item, Selection):
                found += [(f"{item.view.name}.{name}", item.view.feature(name), item.view) for name in item.names]
            elif isinstance(item, Outputs):
                transform = item.transform
                found += [(f"{transform.name}.{name}", transform.output(name), transform) for name in item.names]
        return tuple(found)

    @property
    def transforms(self) -> tuple[OnDemandTransform, ...]:
        """The distinct transforms that it needs, each after those whose outputs it takes."""
        found: dict[str, OnDemandTransform] = {}

        def need(transform: OnDemandTransform) -> None:
            for source in transform.sources:
                if isinstance(source, OnDemandTransform):
                    need(source)
            found.setdefault(transform.id, transform)

        for item in self.features:
            if isinstance(item, Outputs):
                need(item.transform)
        return tuple(found.values())

    @property
    def views(self) -> tuple[FeatureView, ...]:
        """The distinct views that it reads, its own in order of first use, then those that only transforms need."""
        own = [item.view for item in self.features if isinstance(item, Selection)]
        needed = [s for t in self.transforms for s in t.sources if isinstance(s, FeatureView)]
        return tuple({view.id: view for view in (*own, *needed)}.values())

    def reads(self, view: FeatureView) -> tuple[str, ...]:
        """Return the features of ``view`` that it reads, for itself or for a transform, in the view's order."""
        inputs: Iterable[object] = (given for t in self.transforms for given in t.inputs.values())
        names = {
            name
            for item in (*self.features, *inputs)
            if isinstance(item, Selection) and item.view.id == view.id
            for name in item.names
        }
        return tuple(f.name for f in view.features if f.name in names)

    @property
    def keys(self) -> dict[str, Type]:
        """Every key column that a request carries, in order of first use."""
        return {key: type_ for view in self.views for key, type_ in view.entity.keys.items()}

    @property
    def request_columns(self) -> dict[str, Type]:
        """Every other column that a request carries, for its transforms, in order of first use."""
        given = (i for transform in self.transforms for i in transform.inputs.values())
        return {i.name: i.type for i in given if isinstance(i, RequestColumn)}

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    def to_dict(self) -> Json:
        return self.meaning() | {"owner": self.owner, "description": self.description, "tags": dict(self.tags)}

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "version": self.version,
            "dtype": str(self.dtype),
            "features": [_to_dict(item) for item in self.features],
        }

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(
        cls, d: Json, views: Mapping[str, FeatureView], transforms: Mapping[str, OnDemandTransform]
    ) -> FeatureService:
        """Rebuild from ``to_dict``, with views and transforms by ``name@version``."""
        features: list[Selection | Outputs] = []
        for item in d["features"]:
            names = tuple(item["names"])
            if "view" in item:
                features.append(Selection(views[f"{item['view']}@{item['version']}"], names))
            else:
                features.append(Outputs(transforms[f"{item['transform']}@{item['version']}"], names))
        return cls(
            d["name"],
            features,
            dtype=parse_type(d["dtype"]),
            version=d["version"],
            owner=d["owner"],
            description=d["description"],
            tags=d["tags"],
        )


def _chosen(what: str, item: object) -> Selection | Outputs:
    if isinstance(item, FeatureView):
        return Selection(item, tuple(f.name for f in item.features))
    if isinstance(item, OnDemandTransform):
        return Outputs(item, tuple(f.name for f in item.outputs))
    if isinstance(item, Selection | Outputs):
        return item
    raise DefinitionError(f"{what}: {item!r} is neither a feature view nor a transform, nor features chosen from one")


def _sources(items: Iterable[object]) -> Iterator[FeatureView | OnDemandTransform]:
    """Yield the view or transform of each item, and those of a transform's inputs, as often as they stand there."""
    for item in items:
        if isinstance(item, Selection):
            yield item.view
        elif isinstance(item, Outputs):
            yield item.transform
            yield from _sources(item.transform.inputs.values())


def _merged(items: Iterable[Selection | Outputs]) -> tuple[Selection | Outputs, ...]:
    """Join neighbours of one view or transform: ``w["a"], w["b"]`` and ``w["a", "b"]`` mean the same."""
    merged: list[Selection | Outputs] = []
    for item in items:
        last = merged[-1] if merged else None
        if isinstance(item, Selection) and isinstance(last, Selection) and last.view == item.view:
            merged[-1] = Selection(item.view, last.names + item.names)
        elif isinstance(item, Outputs) and isinstance(last, Outputs) and last.transform == item.transform:
            merged[-1] = Outputs(item.transform, last.names + item.names)
        else:
            merged.append(item)
    return tuple(merged)


def _one_type(what: str, role: str, columns: dict[str, tuple[Type, str]], name: str, type_: Type, where: str) -> None:
    """Refuse a column of the request that two definitions give different types."""
    first, place = columns.setdefault(name, (type_, where))
    if first != type_:
        raise DefinitionError(f"{what}: {role} {name!r} is {first} in {place} and {type_} in {where}")


def _to_dict(item: object) -> Json:
    if isinstance(item, Selection):
        source: FeatureView | OnDemandTransform = item.view
        kind = "view"
    else:
        assert isinstance(item, Outputs)
        source, kind = item.transform, "transform"
    return {kind: source.name, "version": source.version, "hash": source.hash, "names": list(item.names)}
