"""A recipe says what is done to each role, and in which stages. It never names a module, so it fits every architecture.

Recipes are YAML files; those of the papers lie in ``recipes/``. Unknown keys, values out of range and rules that
contradict each other are refused with the file, the key and what is allowed there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from .masks import Pattern
from .quantizers import weight_note
from .rules import AttentionRule, EmbeddingRule, Lsq, Q8Bert, Record, Rule, Unstructured, parse_sparsity
from .stages import Admm, Calibrate, Finetune, Iterative, Prune, SrSte, Stage, Storage, Student


class RecipeError(ValueError):
    """A recipe that cannot be found or read, or that contradicts itself."""


class Recipe(Record):
    """A whole compression recipe; see ``recipes/*.yaml`` for the published systems.

    Args:
        permute_channels: reorder the in_features of the matrices that the adapter declares permutable before anything
            is pruned, so that N:M keeps more of their magnitude; outputs of the dense model stay what they were.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    source: str
    rules: tuple[Rule, ...] = ()
    attention: AttentionRule | None = None
    embeddings: EmbeddingRule | None = None
    student: Student | None = None
    untie_final_projection: bool = False
    permute_channels: bool = False
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
        self._check_pruning()
        self._check_calibration()
        trained = [stage for stage in self.stages if isinstance(stage, Finetune)]
        if trained and trained[0].distill is not None and trained[0].distill.teacher == "previous":
            raise ValueError("the first finetune stage has no previous one to learn from: use `teacher: dense`")
        if self.student is not None and not trained:
            raise ValueError("a student of fewer blocks must be trained: add a `finetune` stage")
        return self

    def _check_pruning(self) -> None:
        patterns = [parse_sparsity(rule.sparsity) for rule in self.rules if rule.sparsity]
        maps = self.attention is not None and self.attention.sparsity is not None
        prunes = [stage for stage in self.stages if isinstance(stage, Prune)]
        policies = [stage.policy for stage in self.stages if isinstance(stage, Finetune)]
        moving = [policy for policy in policies if isinstance(policy, SrSte | Admm | Iterative)]
        if (patterns and not prunes and not moving) or (maps and not prunes):
            raise ValueError("a rule asks for sparsity but no stage is `prune`: add `- stage: prune`")
        if prunes and not patterns and not maps:
            raise ValueError("stage `prune` has nothing to do: no rule asks for sparsity")
        if any(prune.quantize for prune in prunes) and not all(
            isinstance(r.weight, Lsq) for r in self.rules if r.sparsity
        ):
            raise ValueError(
                "prune with quantize: only lsq keeps the scales that the columns were rounded with: "
                "write `weight: {method: lsq}` in the sparse rules"
            )
        if len(prunes) > 1:
            raise ValueError("stage `prune` stands twice; it runs once")
        if self.permute_channels and not any(isinstance(p, Pattern) for p in patterns):
            raise ValueError("permute_channels helps N:M sparsity, but no rule asks for it")
        if self.permute_channels and any(prune.method == "inherit" for prune in prunes):
            raise ValueError("permute_channels moves zeros out of their groups: a mask cannot be inherited then")
        for policy in moving:
            if not patterns:
                raise ValueError(f"policy {policy.method} moves masks, but no rule asks for sparsity")
            if isinstance(policy, SrSte) and not all(isinstance(p, Pattern) for p in patterns):
                raise ValueError("policy sr_ste needs N:M sparsity in every rule, found an unstructured share")
            if isinstance(policy, Iterative):
                shares = {pattern.zeros for pattern in patterns if isinstance(pattern, Unstructured)}
                if any(isinstance(pattern, Pattern) for pattern in patterns):
                    raise ValueError("policy iterative prunes without structure: write a share of zeros such as '70%'")
                if len(shares) > 1:
                    raise ValueError("policy iterative has one threshold: write the same share of zeros in every rule")
                policy.events(shares.pop())  # refuses a share that is no multiple of the step

    def _check_calibration(self) -> None:
        quantized = any(rule.weight for rule in self.rules) or bool(self.attention and self.attention.quantized)
        quantized = quantized or bool(self.embeddings and self.embeddings.method == "q8bert")
        calibrations = [stage for stage in self.stages if isinstance(stage, Calibrate)]
        if quantized and not calibrations:
            raise ValueError("a rule asks for a quantizer but no stage is `calibrate`: add `- stage: calibrate`")
        if any(stage.reextract_mask for stage in calibrations) and not any(isinstance(s, Prune) for s in self.stages):
            raise ValueError("`reextract_mask` makes masks anew, and no stage made any: add `- stage: prune`")
        if calibrations and not quantized:
            raise ValueError("stage `calibrate` has nothing to do: no rule asks for a quantizer")
        if calibrations and calibrations[-1].temporary:
            raise ValueError("the last calibrate stage must name no quantizer, so that the rules' own come last")
        if any(not stage.temporary for stage in calibrations[:-1]):
            raise ValueError("stage `calibrate` stands twice; all but the last must name `weight`, `input` or both")

    @property
    def needs_training(self) -> bool:
        return any(isinstance(stage, Finetune) for stage in self.stages)

    @property
    def needs_data(self) -> bool:
        """Whether some stage trains, calibrates on inputs, or prunes by calibration data."""
        inputs = [rule.input for rule in self.rules if rule.input is not None]
        by_input = any(not (i.method == "dynamic" or (isinstance(i, Q8Bert) and i.dynamic)) for i in inputs)
        by_input = by_input or bool(self.attention and self.attention.quantized)
        for stage in self.stages:
            if isinstance(stage, Finetune) or (isinstance(stage, Calibrate) and by_input):
                return True
            if isinstance(stage, Prune) and stage.method in ("wanda", "sparsegpt"):
                return True
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """What some weight quantizer, of a rule or of one stage, uses in place of what it is asked for."""
        weights = [*(rule.weight for rule in self.rules), *(getattr(stage, "weight", None) for stage in self.stages)]
        notes = (weight_note(weight.model_dump(mode="json")) for weight in weights if weight is not None)
        return tuple(dict.fromkeys(filter(None, notes)))

    def at(self, index: int) -> Recipe:
        """The recipe with the quantizers that are in force during stage ``index``: those of the rules, unless the last
        calibrate stage up to there stands in for them."""
        stage = next((s for s in reversed(self.stages[: index + 1]) if isinstance(s, Calibrate)), None)
        if stage is None:
            stage = next((s for s in self.stages if isinstance(s, Calibrate)), None)
        if stage is None or not stage.temporary:
            return self
        rules = []
        for rule in self.rules:
            changes: dict[str, Any] = {}
            if rule.weight is not None and stage.weight is not None:
                changes["weight"] = stage.weight
            if rule.input is not None and stage.input is not None:
                changes["input"] = stage.input
            rules.append(rule.model_copy(update=changes))
        attention = self.attention
        if attention is not None and stage.attention is not None:
            maps = {name: getattr(stage.attention, name) for name in ("q", "k", "p", "v")}
            attention = attention.model_copy(update=maps)
        return self.model_copy(update={"rules": tuple(rules), "attention": attention})

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
        """A copy with the given settings of every finetune stage replaced (``epochs``, ``learning_rate``, ...),
        ``seed``, ``permute_channels``, ``attention``, the N:M of the attention maps, or ``blocks``, those of a student
        cut from its teacher. The copy keeps the name, since the resolved recipe travels with each checkpoint."""
        data = self.model_dump(mode="json")
        fixed = ("stage", "distill", "policy", "dropout", "steps")
        for key, value in values.items():
            if key in ("seed", "permute_channels"):
                data[key] = value
                continue
            if key == "attention":
                if self.attention is None or self.attention.sparsity is None:
                    raise RecipeError(
                        f"recipe {self.name} keeps attention maps dense; gpusq-gemm-mha-int8 has N:M maps"
                    )
                data["attention"]["sparsity"] = value
                continue
            if key == "blocks":
                if self.student is None:
                    raise RecipeError(f"recipe {self.name} keeps all blocks; pkd-6 cuts a student of fewer")
                data["student"]["blocks"] = value
                continue
            if key not in Finetune.model_fields or key in fixed:
                allowed = sorted(set(Finetune.model_fields) - set(fixed))
                raise RecipeError(
                    f"cannot override {key!r}; allowed: seed, permute_channels, attention, blocks, {', '.join(allowed)}"
                )
            for stage in data["stages"]:
                if stage["stage"] == "finetune" and not (key == "epochs" and stage["policy"]["method"] == "iterative"):
                    stage[key] = value
                    if key == "epochs":
                        stage["steps"] = None
        return Recipe.parse(data, where=f"recipe {self.name} with overrides")


def recipe_names() -> list[str]:
    """Names of the built-in recipes, sorted."""
    return sorted(path.stem for path in _builtin_folder().glob("*.yaml"))


def _builtin_folder() -> Path:
    return Path(str(resources.files(__package__) / "recipes"))


def _explain(fault: Any) -> str:
    # A discriminated union puts the chosen member into the location; a user's file has no such key.
    location = [part for part in fault["loc"] if part not in _MEMBERS]
    key = ".".join(str(part) for part in location) or "recipe"
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
    records: list[type[BaseModel]] = [Recipe]
    for part in location:
        field = next((r.model_fields[part] for r in records if part in r.model_fields), None)
        if field is not None:
            records = _records(field.annotation) or records
        else:  # a list index, or the member of a union
            records = [record for record in records if _tag(record) == part] or records
    return list(records[0].model_fields)


def _records(annotation: Any) -> list[type[BaseModel]]:
    """The record types inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for inner in get_args(annotation) for record in _records(inner)]


def _tag(record: type[BaseModel]) -> str | None:
    """The value of ``stage`` or ``method`` that picks this member of a union."""
    field = record.model_fields.get("stage") or record.model_fields.get("method")
    return None if field is None else get_args(field.annotation)[0]


_MEMBERS = {
    _tag(record)
    for field in (*Recipe.model_fields.values(), *Rule.model_fields.values(), *Finetune.model_fields.values())
    for record in _records(field.annotation)
} - {None}
