"""What needs an environment of its own: the lower bounds, the built package, and other projects.

``nox -s lower_bounds`` runs the tests with the oldest packages that pyproject.toml allows; arguments after ``--`` go to
pytest in place of the paths. ``nox -s package`` builds sdist and wheel, checks them, and uses them in a fresh
environment. ``nox -s clients`` trains modules of other projects with our callbacks, and ``nox -s clients-darts`` those
of one; what came of it goes into docs/compatibility.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nox
from packaging.requirements import Requirement

nox.options.sessions = ["lower_bounds", "package"]
nox.options.default_venv_backend = "venv"

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
# First of all, so that a build for the CPU is taken where the index has one. torchvision fits one release of torch.
TORCH = ["torch==2.13.0"]
VISION = ["torch==2.14.1", "torchvision==0.29.1"]
# What the tests of the package import, without what the studies, the documents and the comparisons take.
TOOLS = [
    "hypothesis",
    "matplotlib",
    "packaging",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "scikit-learn",
    "tensorboard",
]
MODELS = ["transformers==4.46.*", "peft==0.14.*"]  # later ones ask for a later PyTorch
# The tests of the package that take neither a compiler nor several processes.
PATHS = ["tests/functional", "tests/metrics", "tests/callbacks", "tests/test_layer_tap.py", "tests/test_claims.py"]
PLAIN = "not compiled and not ddp and not browser"


def oldest(text: str) -> str:
    """Return a requirement of the oldest version that a requirement allows."""
    found = Requirement(text)
    [version] = [bound.version for bound in found.specifier if bound.operator == ">="]
    return f"{found.name}=={version}"


def lower_bounds_of(project: dict[str, Any]) -> list[str]:
    """Return requirements of the oldest packages, pytorch_lightning of the tests among them."""
    tests = [text for text in project["optional-dependencies"]["test"] if text.startswith("pytorch-lightning")]
    return [oldest(text) for text in (*project["dependencies"], *tests)]


@nox.session
def lower_bounds(session: nox.Session) -> None:
    """Test with the oldest packages that pyproject.toml allows."""
    session.install(*lower_bounds_of(PROJECT), *TOOLS, *MODELS, ".[cli]")
    session.run("python", "-m", "pip", "list")
    arguments = session.posargs or ["-n", "2", "-m", PLAIN, *PATHS]
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *arguments, env={"OMP_NUM_THREADS": "1"})


# With no extra installed.
USE = """
import lightning as L, torch
from lightning_relflat import FAM, FlatnessMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
trainer = L.Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, logger=False, enable_checkpointing=False,
                    callbacks=[FAM(), FlatnessMonitor()])
trainer.fit(BoringModel())
assert trainer.callback_metrics["train/relative_flatness"] > 0, trainer.callback_metrics
assert trainer.callback_metrics["fam/penalty"] > 0, trainer.callback_metrics
"""


@nox.session
def package(session: nox.Session) -> None:
    """Build sdist and wheel, check them, and use them as a user does: the wheel, and the tests that the sdist holds."""
    place = Path(session.create_tmp()).resolve()
    shutil.rmtree(place / "built", ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(place / "built"), ".")
    [wheel], [sdist] = (place / "built").glob("*.whl"), (place / "built").glob("*.tar.gz")
    session.run("python", "-m", "twine", "check", "--strict", str(wheel), str(sdist))
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "build", "twine")
    session.install(*TORCH)
    session.install(str(wheel))
    session.run("python", "-m", "pip", "check")
    session.chdir(place / "built")
    session.run("python", "-c", USE)
    session.install("packaging", "pytest", "pytest-timeout", "pytorch-lightning", "hatchling")
    session.run("tar", "--extract", "--file", str(sdist), external=True)
    session.chdir(place / "built" / sdist.name.removesuffix(".tar.gz"))
    tests = [
        "tests/test_layer_tap.py",
        "tests/test_project.py",
        "tests/test_requirements.py",
        "tests/callbacks/test_step.py",
    ]
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, env={"OMP_NUM_THREADS": "1"})


# Also needed are what a project imports without requiring it, and what only some of its models do; the project itself
# comes last.
PROJECTS: dict[str, list[str]] = {
    "demos": [*TORCH, "lightning"],
    "hydra": [*TORCH, "hydra-core"],
    "transformers": [*TORCH, "transformers"],
    "peft": [*TORCH, "transformers", "peft"],
    "torch_geometric": [*TORCH, "torch_geometric"],
    "darts": [*TORCH, "darts"],
    "neuralforecast": [*TORCH, "neuralforecast"],
    "pytorch_forecasting": [*TORCH, "pytorch-forecasting"],
    "pytorch_tabular": [*TORCH, "requests", "pytorch-tabular"],
    "scvi": [*TORCH, "scvi-tools"],
    "monai": [*TORCH, "einops", "monai"],
    "timm": [*VISION, "timm"],
    "torchvision": VISION,
    "segmentation_models": [*VISION, "segmentation-models-pytorch"],
    "lightly": [*VISION, "lightly"],
}


@nox.session
def clients(session: nox.Session) -> None:
    """Run the sessions of all projects."""
    for name in PROJECTS:
        session.notify(f"clients-{name}")


def make_session(name: str, packages: list[str]) -> None:
    """Make the session of a project."""

    def run(session: nox.Session) -> None:
        pip = ["python", "-m", "pip", "install", "--quiet"]
        torch = [package for package in packages if package.startswith("torch")]
        for wanted in (torch, packages, [*torch, "pytest", "pytest-timeout", "."]):
            said = session.run_install(*pip, *wanted, silent=True, success_codes=range(256))
            if isinstance(said, str) and "ERROR:" in said:
                reason = next(line for line in said.splitlines() if "ERROR:" in line)
                session.run("python3", "-m", "tests.clients.compatibility", name, "--refused", reason, external=True)
                session.error(reason)
        results = Path(session.create_tmp()).resolve() / "results.xml"
        test = f"tests/clients/test_{name}.py"
        environment = {"OMP_NUM_THREADS": "1"}
        session.run("pytest", test, f"--junitxml={results}", *session.posargs, env=environment, success_codes=[0, 1])
        session.run("python", "-m", "tests.clients.compatibility", name, str(results), packages[-1].split("==")[0])

    run.__doc__ = f"Train modules of {name}."
    nox.session(run, name=f"clients-{name}")


for project, requirements in PROJECTS.items():
    make_session(project, requirements)
