"""From TOML, presets and --set to a Recipe, or to one line that says what is wrong."""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.recipe.rules import Recipe
from parallel.recipe.sections import DATA_KEYS, PRESETS, SECTIONS, RecipeError, Section


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates the TOML file `path`, with `section.key=value` overrides on top.

    Raises RecipeError. File names in [data] are relative to the working directory, as on any command line.
    """
    return recipe_from_tables(apply_overrides(read_toml(path), overrides), default_name=Path(path).stem)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; RecipeError where it cannot be read or parsed."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except FileNotFoundError:
        raise RecipeError("file", str(path), "does not exist; see recipes/ for those shipped") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError("file", str(path), f"cannot be read ({reason}); give a TOML text file") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError comes of an integer of 5,000 digits
        raise RecipeError("file", str(path), f"is not valid TOML ({str(error)[:200]})") from None


def apply_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tables` with each `section.key=value` set; the value is read as TOML, else as a bare string."""
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in tables.items()}
    for text in overrides:
        key, equals, value_text = text.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not equals or not all(path) or len(path) > 2:
            raise RecipeError("--set", text, "write section.key=value, as in train.steps=5")
        try:
            [value] = tomllib.loads(f"value = {value_text}").values()
        except (ValueError, RecursionError):
            value = value_text.strip()
        if len(path) == 1:
            merged[path[0]] = value
        else:
            section = merged.setdefault(path[0], {})
            if not isinstance(section, dict):
                raise RecipeError(path[0], section, f"is a section; write [{path[0]}] with keys below it")
            section[path[1]] = value
    return merged


def recipe_from_tables(tables: Mapping[str, Any], *, default_name: str = "run") -> Recipe:
    """Validates parsed TOML. Raises RecipeError at the first thing that is wrong."""
    refuse_unknown_keys(tables)
    given = {**tables, "model": _with_preset(tables.get("model", {}))}
    sections: dict[str, Any] = {key: _read_section(key, cls, given.get(key, {})) for key, cls in SECTIONS.items()}
    source = sections["data"].source
    for key, value in given.get("data", {}).items():
        if key not in ("source", *DATA_KEYS[source]):
            raise RecipeError(f"data.{key}", value, f"has no meaning with data.source = {source}; remove it")
    return Recipe(name=tables.get("name", default_name), **sections)


def refuse_unknown_keys(tables: Mapping[str, Any]) -> None:
    """RecipeError for the first section or key that does not exist: a slip of the pen, whatever else is wrong."""
    for key, value in tables.items():
        if key not in SECTIONS and key != "name":
            kind = "section" if isinstance(value, dict) else "key"
            remedy = _where(key) or f"; {did_you_mean(key, [*SECTIONS, 'name'])}"
            raise RecipeError(key, value, f"unknown {kind}{remedy}")
    for name, cls in SECTIONS.items():
        known = [field.name for field in dataclasses.fields(cls)]
        table = tables.get(name)
        for key, value in table.items() if isinstance(table, dict) else ():
            if key not in known:
                remedy = _where(key) or f"; {did_you_mean(key, known)}"
                raise RecipeError(f"{name}.{key}", value, f"unknown key{remedy}")


def _where(key: str) -> str:
    """What to say of one that has its place in another section; "" if it has none."""
    sections = (name for name, cls in SECTIONS.items() if key in (field.name for field in dataclasses.fields(cls)))
    section = next(sections, None)
    return f" here; it belongs in [{section}]" if section else ""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """What to say of a word that is none of the `known`."""
    close = difflib.get_close_matches(str(word)[:100], known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _with_preset(table: Any) -> Any:
    """[model] with the preset's keys under the user's, and the usual values of what neither gives."""
    if not isinstance(table, dict):
        return table
    preset = table.get("preset", "tiny")
    if not isinstance(preset, str) or preset not in PRESETS:
        required = ("n_layers", "d_model", "n_heads", "vocab_size")
        missing = [key for key in required if key not in table]
        if preset == "none" and missing:
            raise RecipeError("model.preset", preset, f"without a preset give {', '.join(missing)} too")
        merged = dict(table)
        if isinstance(merged.get("n_heads"), int):
            merged.setdefault("n_kv_heads", merged["n_heads"])
        if isinstance(merged.get("d_model"), int) and 0 < merged["d_model"] <= 1_000_000:
            merged.setdefault("d_ff", -(-8 * merged["d_model"] // 3 // 32) * 32)  # 8/3·d (Shazeer 2020), in 32s
        return merged
    return PRESETS[preset] | table


def _read_section(name: str, cls: type[Section], table: Any) -> Section:
    if not isinstance(table, dict):
        raise RecipeError(name, table, f"is a section; write [{name}] with keys below it")
    return cls(**table)
