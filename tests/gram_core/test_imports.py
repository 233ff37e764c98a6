import subprocess
import sys

import gram_core

ALONE = """
import importlib, pkgutil, sys

BLOCKED = {"ray", "deepspeed", "dvc", "dvclive", "s3fs", "fsspec", "boto3", "yaml", "ruamel",
           "hydra", "omegaconf", "pipelines", "stages"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import gram_core
names = [m.name for m in pkgutil.walk_packages(gram_core.__path__, "gram_core.")]
for name in names:
    importlib.import_module(name)
print("imported", len(names))
print("loaded", sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules}))
"""


def test_the_core_imports_without_any_orchestration():
    """Every module, in an interpreter where Ray, DeepSpeed, DVC and the like cannot be found."""
    assert gram_core.__file__ is not None
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert int(lines[0].split()[1]) > 25
    assert lines[1] == "loaded []"
