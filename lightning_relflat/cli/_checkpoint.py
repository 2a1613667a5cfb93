"""Reading a checkpoint such that the file decides nothing: what it may hold, and what is refused in one line."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import io
import pickle
import pydoc
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.migration.utils import migrate_checkpoint
from packaging.version import InvalidVersion, Version

from lightning_relflat.cli._shared import InputError, class_path, say

# Where Lightning looks for arguments besides, as its first versions saved them.
_PAST_ARGUMENTS = ("hparams", "module_arguments")
# What LightningCLI puts beside them: who builds the module. Before 2.6.6 Lightning imports and calls whatever is there.
_INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
# Before it, a file made for the purpose gets past `weights_only` (GHSA-53q9-r3pm-6pq6, GHSA-63cw-57p8-fm3p).
_SAFE_LOADING = "2.10.0"
# What torch.compile, and what computes in parallel, put before the names of the weights of the module within.
_WRAPPED = ("_orig_mod.", "module.")
_WRAPPERS = "torch.compile and DataParallel name them"
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def load_model(path: str, config: Namespace, given: Namespace) -> tuple[LightningModule, dict[str, Any]]:
    """Return the model of a checkpoint, and what tells it from others.

    Args:
        path: the file.
        config: the options.
        given: those that the user gave.

    Returns:
        The model; and its arguments that are plain values, with ``epoch`` and ``step``.

    Raises:
        InputError: if the checkpoint cannot be read, is not safe to load, or does not fit the class.
    """
    name = class_path(config.model, "model")
    checkpoint = read(path, trust=config.trust)
    kind: Any = pydoc.locate(name)
    saved = _arguments(path, checkpoint, kind.CHECKPOINT_HYPER_PARAMS_KEY)
    _check_instantiator(path, saved, kind, name, trust=config.trust)
    own = given.model.get("init_args")
    kwargs = _instantiated(kind, own.as_dict()) if own else {}
    kwargs |= dict(given.model.get("dict_kwargs") or {})
    state = checkpoint["state_dict"]
    model: LightningModule | None = None
    misfit: RuntimeError | None = None
    ways = ["", *_wrappings(state)]
    for wrapped in ways:
        source, loading = _source(path, wrapped, trust=config.trust)
        try:
            with warnings.catch_warnings():
                if wrapped != ways[-1]:  # what is missing is said of the last way alone
                    warnings.filterwarnings("ignore", "Found keys that are")
                model = kind.load_from_checkpoint(source, map_location="cpu", **loading, **kwargs)
        except (TypeError, argparse.ArgumentError) as error:
            holds = ", ".join(key for key in saved if not key.startswith("_")) or "no arguments"
            raise InputError(
                f"{name} cannot be built: {error}; {path} holds {holds}; give the rest as --model.NAME VALUE"
            ) from error
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            misfit = misfit or error
            continue
        # One that does without weights that are not there (`strict_loading`) may have found none at all.
        named = {key.removeprefix(wrapped) for key in state}
        if model.strict_loading or len(ways) == 1 or not named.isdisjoint(model.state_dict()):
            break
        model = None
    if model is None:
        raise _does_not_fit(path, name, state, misfit) from misfit
    if wrapped:
        say("warning", f"the weights in {path} are named {wrapped}…, as {_WRAPPERS}; they were loaded without that")
    arguments = {key: value for key, value in (saved | kwargs).items() if not key.startswith("_")}
    facts = {key: value for key, value in arguments.items() if isinstance(value, bool | int | float | str)}
    return model, facts | {"epoch": checkpoint.get("epoch"), "step": checkpoint.get("global_step")}


def _wrappings(names: Iterable[str]) -> list[str]:
    """Return what all names of weights begin with where a module was saved within others, from the outermost on."""
    found, names = "", list(names)
    wrappings = []
    while names and (own := next((own for own in _WRAPPED if all(name.startswith(found + own) for name in names)), "")):
        found += own
        wrappings.append(found)
    return wrappings


def _does_not_fit(path: str, name: str, state: Mapping[str, Any], error: RuntimeError | None) -> InputError:
    """Return what to say of weights that are others than the module's."""
    # "Error(s) in loading state_dict for Net:", then a line for each kind of misfit
    reason = " ".join(str(error or "").partition(":")[2].split())
    unknown = re.findall(r'"([^"]+)"', reason.partition("Unexpected key(s)")[2])
    reason = reason if len(reason) < 300 else f"{reason[:300]}…"
    advice = "Give the class and the arguments (--model.NAME VALUE) that the checkpoint was saved with"
    wrapped = next((own for own in _WRAPPED if any(f".{own}" in f".{key}" for key in unknown or state)), None)
    if wrapped is not None and (unknown or error is None):
        advice = (
            f"Names of its weights hold {wrapped!r}, as {_WRAPPERS}, and they do not fit without it"
            if _wrappings(state)
            else f"Names of some of its weights hold {wrapped!r}, as {_WRAPPERS}: save them with their names without it"
        )
        advice += "; or give the class and the arguments (--model.NAME VALUE) that the checkpoint was saved with"
    return InputError(f"{path} does not fit {name}: {reason} {advice}".replace(":  ", ": "))


def read(path: str, *, trust: bool) -> dict[str, Any]:
    """Return what a checkpoint of Lightning's holds, tensors without their values.

    Args:
        path: the file.
        trust: whether the file may run code.

    Returns:
        The checkpoint, as this Lightning would have written it.

    Raises:
        InputError: if there is no such checkpoint, or it is not safe to load.
    """
    place = Path(path)
    if place.is_dir():
        raise InputError(
            f"{path} is a folder, as strategies that shard a model write it; make a file of it with "
            "python -m lightning.pytorch.utilities.consolidate_checkpoint"
        )
    if not place.is_file():
        raise InputError(f"there is no checkpoint {path}; give the path of a file that the Trainer saved")
    if not trust and Version(torch.__version__) < Version(_SAFE_LOADING):
        say(
            "warning",
            f"PyTorch {torch.__version__} has known holes through which a file made for the purpose runs code even "
            f"without --trust; they are closed in {_SAFE_LOADING}",
        )
    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=not trust)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|global) `?([\w.]+)", str(error))
        if found is None:
            raise InputError(f"{path} is no checkpoint; give a file that the Trainer saved") from error
        raise InputError(
            f"{path} holds more than tensors and plain values ({found[1]}), and loading it can run any code; if you "
            "trust where it comes from, add --trust"
        ) from error
    except Exception as error:  # whatever a broken file may come to
        raise InputError(
            f"{path} cannot be loaded ({' '.join(str(error).split())[:200]}); is it a whole checkpoint of Lightning's?"
        ) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} is no checkpoint of Lightning's: it has no `state_dict`; give one the Trainer saved")
    if "pytorch-lightning_version" not in checkpoint:
        raise InputError(
            f"{path} is no checkpoint of Lightning's: it names no version of it; give one that the Trainer saved"
        )
    version = checkpoint["pytorch-lightning_version"]
    try:
        Version(version)
    except (InvalidVersion, TypeError) as error:
        raise InputError(
            f"{path} is no checkpoint of Lightning's: its version is {version!r:.100}; give one that the Trainer saved"
        ) from error
    try:
        return dict(migrate_checkpoint(checkpoint)[0])
    except Exception as error:  # what is missing or of another kind than in the checkpoints of that version
        raise InputError(
            f"{path} cannot be brought from Lightning {version} to the one installed "
            f"({type(error).__name__}: {' '.join(str(error).split())[:100]}); is it a whole checkpoint?"
        ) from error


def _arguments(path: str, checkpoint: dict[str, Any], own: str) -> dict[str, Any]:
    """Return the arguments that a checkpoint has for the module, from all places where Lightning looks for them."""
    found: dict[str, Any] = {}
    for key in (*_PAST_ARGUMENTS, own):
        values = checkpoint.get(key, {})
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise InputError(
                f"{path} cannot be loaded: `{key}` is a {type(values).__name__}, and not a dictionary of arguments "
                "by their names; save it with `save_hyperparameters`"
            )
        found |= values
    return found


def _check_instantiator(path: str, saved: Mapping[str, Any], kind: type, name: str, *, trust: bool) -> None:
    """Refuse a checkpoint that has anything imported or called but the class that was named."""
    builder = saved.get("_instantiator")
    if builder is not None and builder not in _INSTANTIATORS:
        raise InputError(
            f"{path} is to be built by {builder!r:.100}, which is none of Lightning's own; such a file can run any "
            "code, and is not loaded"
        )
    of = saved.get("_class_path")
    if of is not None:
        module, _, own = of.rpartition(".") if isinstance(of, str) else ("", "", "")
        found = getattr(sys.modules.get(module), own, None)  # nothing is imported because a file names it
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise InputError(f"{path} was saved by {of!r:.100}, which is no {name}; give its class with --model")
    if builder is None or trust:
        return
    for key, value in saved.items():
        code = None if key in ("_instantiator", "_class_path") else _code(value)
        if code is not None:
            raise InputError(
                f"{path} holds {key} = {value!r:.100}, for which {code!r:.100} would be imported and called; if you "
                "trust where it comes from, add --trust"
            )


def _code(value: Any, depth: int = 8) -> str | None:
    """Return a dotted path in a value that LightningCLI's parser may import, which reads texts as YAML."""
    if depth == 0:
        return str(value)  # deeper than any that is meant well
    if isinstance(value, str):
        whole = _DOTTED.fullmatch(value.strip())
        if whole is not None:
            top = whole[0].partition(".")[0]
            return whole[0] if top in sys.modules or importlib.util.find_spec(top) is not None else None
        try:
            inner = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            return None
        return None if inner == value else _code(inner, depth - 1)
    if isinstance(value, Mapping):
        if "class_path" in value:
            return str(value["class_path"])
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return next((found for entry in value if (found := _code(entry, depth - 1)) is not None), None)
    return None


def _source(path: str, wrapped: str, *, trust: bool) -> tuple[str | io.BytesIO, dict[str, Any]]:
    """Return what Lightning is to load, and how; the weights without what all their names begin with."""
    knows = "weights_only" in inspect.signature(LightningModule.load_from_checkpoint).parameters
    loading = {"weights_only": not trust} if knows else {}
    if not wrapped and (knows or trust):
        return path, loading
    # Lightning before 2.6 reads with all of pickle, so that it gets what was read without.
    whole = torch.load(path, map_location="cpu", weights_only=not trust)
    if wrapped:
        whole["state_dict"] = {key.removeprefix(wrapped): value for key, value in whole["state_dict"].items()}
    plain = io.BytesIO()
    torch.save(whole, plain)
    plain.seek(0)
    return plain, loading


def _instantiated(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return given arguments as the class takes them; those of classes may be objects of other classes."""
    parser = ArgumentParser(exit_on_error=False)
    names = set(inspect.signature(kind).parameters)
    parser.add_class_arguments(kind, "model", fail_untyped=False, skip=names - set(values), instantiate=False)
    return dict(parser.instantiate(parser.parse_object({"model": values}))["model"].items())
