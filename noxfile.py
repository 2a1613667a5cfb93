"""Train modules of other projects with our callbacks, each project in an environment of its own.

``nox -s clients`` runs them all and ``nox -s clients-darts`` one; what came of it goes into docs/compatibility.md.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.sessions = ["clients"]
nox.options.default_venv_backend = "venv"

# First of all, so that a build for the CPU is taken where the index has one. torchvision fits one release of torch.
TORCH = ["torch==2.13.0"]
VISION = ["torch==2.14.1", "torchvision==0.29.1"]
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
