"""Which folder becomes which package; everything else stands in pyproject.toml.

``passes/`` and ``backends/`` stand at the top of the repository, where one finds them, and install inside the
package: a top-level module named ``backends`` would break users who have such a folder. pyproject.toml can
only list such packages one by one, so a new subpackage would be forgotten in the wheel; here they are found.
"""

from setuptools import find_packages, setup

INSIDE = ("passes", "backends")
found = find_packages(include=["fastpar", "fastpar.*", *INSIDE, *(f"{name}.*" for name in INSIDE)])

setup(
    packages=[name if name.split(".")[0] == "fastpar" else f"fastpar.{name}" for name in found],
    package_dir={f"fastpar.{name}": name for name in INSIDE} | {"fastpar": "fastpar"},
    package_data={
        "fastpar": ["py.typed"],
        "fastpar.demo": ["*.safetensors", "*.json"],
        "fastpar.plan": ["presets/*.toml"],
    },
)
