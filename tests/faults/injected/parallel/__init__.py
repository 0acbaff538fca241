"""The library, with the `training` beside this file in place of its own: PYTHONPATH puts this folder first."""

import sys
from pathlib import Path

__path__ += [str(Path(path) / "parallel") for path in sys.path if (Path(path) / "parallel" / "recipe").is_dir()][:1]
