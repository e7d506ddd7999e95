"""Feature services: what one model asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from featserve.definitions.rules import Json, check_name, check_tags, check_version, content_hash, unique
from featserve.definitions.view import FeatureView, Selection
from featserve.errors import DefinitionError
from featserve.types import Float32, Float64, Type, parse_type


@dataclass(frozen=True, slots=True)
class FeatureService:
    """What one model asks for: features of view versions, in order, as one vector.

    ``features``: views (all of their features) or selections (``view["a", "b"]``). ``dtype``: Float32 or Float64, the
    precision of the served tensor. Features that it holds are floats (rounded to it), bools, vectors and, for Float64,
    int32; strings, bytes, timestamps and integers that would lose bits are served as typed columns beside it. Feature
    names in answers and training frames are ``view.feature``.
    """

    name: str
    features: Sequence[FeatureView | Selection]
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
        chosen: list[Selection] = []
        for item in self.features:
            if isinstance(item, FeatureView):
                chosen.append(Selection(item, tuple(f.name for f in item.features)))
            elif isinstance(item, Selection):
                chosen.append(item)
            else:
                raise DefinitionError(f"{what}: {item!r} is neither a feature view nor features chosen from one")
        if not chosen:
            raise DefinitionError(f"{what}: features is a list of at least one view or selection")
        unique(what, "feature", [f"{s.view.name}.{n}" for s in chosen for n in s.names])
        keys: dict[str, tuple[Type, str]] = {}
        versions: dict[str, FeatureView] = {}
        for s in chosen:
            if versions.setdefault(s.view.name, s.view) != s.view:
                raise DefinitionError(
                    f"{what}: two definitions of view {s.view.name!r}: {versions[s.view.name].id} and {s.view.id}"
                )
            for key, type_ in s.view.entity.keys.items():
                first, where = keys.setdefault(key, (type_, s.view.id))
                if first != type_:
                    raise DefinitionError(
                        f"{what}: key column {key!r} is {first} in {where} and {type_} in {s.view.id}"
                    )
        object.__setattr__(self, "features", tuple(chosen))
        object.__setattr__(self, "tags", check_tags(what, self.tags))

    @property
    def selections(self) -> tuple[Selection, ...]:
        return tuple(s for s in self.features if isinstance(s, Selection))

    @property
    def views(self) -> tuple[FeatureView, ...]:
        """The distinct views, in order of first use."""
        return tuple({s.view.id: s.view for s in self.selections}.values())

    @property
    def keys(self) -> dict[str, Type]:
        """Every key column that a request carries, in order of first use."""
        return {key: type_ for view in self.views for key, type_ in view.entity.keys.items()}

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
            "features": [
                {"view": s.view.name, "version": s.view.version, "hash": s.view.hash, "names": list(s.names)}
                for s in self.selections
            ],
        }

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(cls, d: Json, views: Mapping[str, FeatureView]) -> FeatureService:
        """Rebuild from ``to_dict``, with ``views`` by ``name@version``."""
        return cls(
            d["name"],
            [Selection(views[f"{s['view']}@{s['version']}"], tuple(s["names"])) for s in d["features"]],
            dtype=parse_type(d["dtype"]),
            version=d["version"],
            owner=d["owner"],
            description=d["description"],
            tags=d["tags"],
        )
