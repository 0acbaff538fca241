"""What a run is: typed, validated, read from TOML.

sections  the tables and their keys          rules  what goes with what: a Recipe          reading  TOML, --set, presets
"""

from parallel.recipe.engine_rules import refuse_missing_packages
from parallel.recipe.reading import apply_overrides, did_you_mean, load_recipe, read_toml, recipe_from_tables
from parallel.recipe.rules import Recipe, check_name
from parallel.recipe.sections import (
    MESH_DIMS,
    PRESETS,
    SCHEDULES,
    SECTIONS,
    SINGLE_STAGE_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    AttentionKernel,
    Context,
    ContextMethod,
    Data,
    Dtype,
    Model,
    Operation,
    RecipeError,
    Recompute,
    Schedule,
    choices,
)
