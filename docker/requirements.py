"""What pyproject.toml beside this file asks for, with the extras that are named: python requirements.py [EXTRA ...]

A layer of the images that stays as it is while only the package changes.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
for extra in sys.argv[1:]:
    project["dependencies"] += project["optional-dependencies"][extra]
print(*project["dependencies"], sep="\n")
