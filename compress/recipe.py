"""A recipe says what is done to each role, and in which stages. It never names a module, so it fits every architecture.

Recipes are YAML files; those of the papers lie in ``recipes/``. Unknown keys, values out of range and rules that
contradict each other are refused with the file, the key and what is allowed there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..models.adapter import BLOCK_ROLES, ROLES
from .masks import Pattern


class RecipeError(ValueError):
    """A recipe that cannot be found or read, or that contradicts itself."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantizer(_Record):
    """Symmetric integer quantizer with a learned scale (LSQ): per output channel for weights, per tensor for inputs."""

    method: Literal["lsq"] = "lsq"
    bits: int = Field(8, ge=2, le=8)


class Rule(_Record):
    """What is done to the GEMMs of some roles. ``block`` in ``roles`` stands for every GEMM inside the blocks."""

    roles: tuple[str, ...] = Field(min_length=1)
    sparsity: str | None = None
    weight: Quantizer | None = None
    input: Quantizer | None = None
    skip_blocks: tuple[int, ...] = ()

    @field_validator("roles")
    @classmethod
    def _known_roles(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [role for role in roles if role not in (*ROLES, "block")]
        if unknown:
            raise ValueError(f"unknown role {unknown[0]!r}; allowed: block, {', '.join(ROLES)}")
        return tuple(dict.fromkeys(r for role in roles for r in (BLOCK_ROLES if role == "block" else (role,))))

    @field_validator("sparsity", mode="before")
    @classmethod
    def _valid_pattern(cls, text: Any) -> str | None:
        # Before pydantic's own check: YAML reads an unquoted 2:4 as the number 124, and the parser says so.
        return None if text is None else str(Pattern.parse(text))

    @model_validator(mode="after")
    def _inputs_need_weights(self) -> Rule:
        if self.input is not None and self.weight is None:
            raise ValueError("input is quantized but weight is not; an integer GEMM needs both: add `weight:`")
        return self


class Prune(_Record):
    """One-shot magnitude pruning; the masks stay fixed afterwards (ASP, Mishra et al. 2021, section 4)."""

    stage: Literal["prune"]
    method: Literal["magnitude"] = "magnitude"


class Calibrate(_Record):
    """Initialise the quantizers from ranges (GPUSQ-TLM's PTQ step) and switch them on.

    ``percentile`` None takes the maximum of |x| over ``batches`` batches, else that percentile of |x|.
    """

    stage: Literal["calibrate"]
    batches: int = Field(10, ge=1)
    percentile: float | None = Field(None, gt=0, lt=100)


class Distill(_Record):
    """Mixed distillation of GPUSQ-TLM: ``hard * CE + soft * KL + feature * MSE`` (equations 4-8; factors of Table 5).

    ``teacher``: ``dense`` is the model handed in, ``previous`` the model as the last fine-tuning stage left it.
    """

    teacher: Literal["dense", "previous"]
    hard: float = Field(1.0, ge=0)
    soft: float = Field(10.0, ge=0)
    feature: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    kl_t_squared: bool = False
    features: tuple[Literal["attn_out", "block_out"], ...] = ("attn_out", "block_out")
    labels: bool = True


class Finetune(_Record):
    """Training with whatever is attached by then: masks fixed, quantizers active after a calibrate stage.

    ``precision: bfloat16`` runs the GEMMs in bfloat16 (autocast); weights, scales, optimizer and losses stay float32.
    """

    stage: Literal["finetune"]
    epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(16, ge=1)
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    precision: Literal["float32", "bfloat16"] = "float32"
    distill: Distill | None = None


Stage = Annotated[Prune | Calibrate | Finetune, Field(discriminator="stage")]


class Storage(_Record):
    """Number formats on disk. ``values``: kept weights of pruned GEMMs that are not quantized; ``other``: matrices that
    no rule touches (embeddings, heads); vectors (biases, LayerNorm) are always float32."""

    values: Literal["float16", "float32"] = "float16"
    other: Literal["float16", "float32"] = "float16"


class Recipe(_Record):
    """A whole compression recipe; see ``recipes/*.yaml`` for the published systems."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    source: str
    rules: tuple[Rule, ...] = ()
    untie_final_projection: bool = False
    stages: tuple[Stage, ...] = ()
    storage: Storage = Storage()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        seen: set[str] = set()
        for rule in self.rules:
            if twice := seen.intersection(rule.roles):
                raise ValueError(f"role {sorted(twice)[0]!r} is claimed by two rules; keep it in one")
            seen.update(rule.roles)
        kinds: list[str] = [stage.stage for stage in self.stages]
        sparse = any(rule.sparsity for rule in self.rules)
        quantized = any(rule.weight for rule in self.rules)
        for needed, what, kind in ((sparse, "sparsity", "prune"), (quantized, "a quantizer", "calibrate")):
            if needed and kind not in kinds:
                raise ValueError(f"a rule asks for {what} but no stage is `{kind}`: add `- stage: {kind}`")
            if kind in kinds and not needed:
                raise ValueError(f"stage `{kind}` has nothing to do: no rule asks for {what}")
            if kinds.count(kind) > 1:
                raise ValueError(f"stage `{kind}` stands twice; it runs once")
        first = next((s for s in self.stages if isinstance(s, Finetune)), None)
        if first is not None and first.distill is not None and first.distill.teacher == "previous":
            raise ValueError("the first finetune stage has no previous one to learn from: use `teacher: dense`")
        return self

    @property
    def needs_training(self) -> bool:
        return any(isinstance(stage, Finetune) for stage in self.stages)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a built-in recipe by name, or a ``.yaml`` file.

        Raises:
            RecipeError: not found, not YAML, or invalid; the message names the file, the key and what is allowed.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            known = recipe_names()
            if str(name_or_path) not in known:
                near = difflib.get_close_matches(str(name_or_path), known, 1, 0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise RecipeError(
                    f"no recipe is named {str(name_or_path)!r}.{hint} Known: {', '.join(known)}; or give a .yaml file"
                )
            path = _builtin_folder() / f"{name_or_path}.yaml"
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not readable as YAML: {error}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: expected a mapping with name, rules and stages, found {type(data).__name__}")
        return cls.parse(data, where=str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate plain data; RecipeError lists every fault with its key."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
            raise RecipeError(f"{where} is not a valid recipe:\n{faults}") from error

    def override(self, **values: Any) -> Recipe:
        """A copy with the given settings of every finetune stage replaced (``epochs``, ``learning_rate``, ...), or
        ``seed``. The copy keeps the name, since the resolved recipe travels with each checkpoint."""
        data = self.model_dump(mode="json")
        for key, value in values.items():
            if key == "seed":
                data["seed"] = value
                continue
            if key not in Finetune.model_fields or key in ("stage", "distill"):
                allowed = sorted(set(Finetune.model_fields) - {"stage", "distill"})
                raise RecipeError(f"cannot override {key!r}; allowed: seed, {', '.join(allowed)}")
            for stage in data["stages"]:
                if stage["stage"] == "finetune":
                    stage[key] = value
        return Recipe.parse(data, where=f"recipe {self.name} with overrides")


def recipe_names() -> list[str]:
    """Names of the built-in recipes, sorted."""
    return sorted(path.stem for path in _builtin_folder().glob("*.yaml"))


def _builtin_folder() -> Path:
    return Path(str(resources.files(__package__) / "recipes"))


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"] if part not in ("prune", "calibrate", "finetune")) or "recipe"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        allowed = _fields_at(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), allowed, 1, 0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{key}: unknown key.{hint} Allowed here: {', '.join(allowed)}"
    found = "" if fault["type"] in ("missing", "value_error") else f", found {fault['input']!r}"
    return f"{key}: {message}{found}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at a place of the recipe, for the message about an unknown one."""
    by_key: dict[str, type[BaseModel]] = {
        "rules": Rule, "weight": Quantizer, "input": Quantizer, "distill": Distill, "storage": Storage,
        "prune": Prune, "calibrate": Calibrate, "finetune": Finetune,
    }  # fmt: skip
    names = [part for part in location if isinstance(part, str) and part in by_key]
    return list((by_key[names[-1]] if names else Recipe).model_fields)
