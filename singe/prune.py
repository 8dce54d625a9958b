"""Pruning as one call."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import torch
from torch import nn
from torch.utils.data import SequentialSampler

from . import checks, values
from .allocation.goal import Allocation, Goal, Target
from .criteria import Criterion, resolve, resolve_elementwise
from .graph.trace import Forward, named_tensors
from .memory import limit
from .models.copies import copy_of
from .models.isolation import plain_torch, preserved_random_state
from .models.precision import Precision, check_precision
from .models.wrappers import unwrapped
from .observer import Callback, Evaluate, Observer
from .ranks import Ranks, meeting
from .records import GroupRecord
from .refit.compensation import Compensate
from .result import PruneResult
from .runs.neurons import NeuronRun
from .runs.options import Options
from .runs.weights import WeightRun
from .scoring.selection import Refresh
from .sparse import SparseResult
from .storage.saved import check as check_savable
from .task import Loss, Task
from .training.data import Stream
from .training.finetune import FineTune

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch brings it

log = logging.getLogger("singe")

Neurons = TypeVar("Neurons", bound=NeuronRun)
Weights = TypeVar("Weights", bound=WeightRun)


class Arguments(TypedDict, total=False):
    """Those of :func:`prune` that have defaults, for type checkers; see there."""

    target: Target
    criterion: str | Criterion | None
    allocation: Allocation | None
    round_to: int
    max_rate: float
    refresh: Refresh
    compensate: Compensate | None
    compensation_images: int
    finetune: FineTune | None
    images: int
    loss: Loss | None
    forward: Forward | None
    ignore: Collection[str]
    recalibrate_bn: int
    analysis_seconds: float
    seed: int
    memory: int | None
    precision: Precision
    latency_batch: int
    progress: bool
    checkpoint: str | os.PathLike[str] | None
    evaluate: Evaluate | None
    callbacks: Iterable[Callback]


@overload
def prune(
    model: nn.Module,
    loader: Iterable[Any],
    rho: float,
    *,
    structured: Literal[True] = ...,
    **arguments: Unpack[Arguments],
) -> PruneResult[GroupRecord]: ...


@overload
def prune(
    model: nn.Module, loader: Iterable[Any], rho: float, *, structured: Literal[False], **arguments: Unpack[Arguments]
) -> SparseResult: ...


@overload
def prune(
    model: nn.Module, loader: Iterable[Any], rho: float, *, structured: bool, **arguments: Unpack[Arguments]
) -> PruneResult[GroupRecord] | SparseResult: ...


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    rho: float,
    *,
    structured: bool = True,
    target: Target = "params",
    criterion: str | Criterion | None = None,
    allocation: Allocation | None = None,
    round_to: int = 1,
    max_rate: float = 1,
    refresh: Refresh = "lazy",
    compensate: Compensate | None = None,
    compensation_images: int = 1024,
    finetune: FineTune | None = FineTune(),  # noqa: B008 - frozen
    images: int = 64,
    loss: Loss | None = None,
    forward: Forward | None = None,
    ignore: Collection[str] = (),
    recalibrate_bn: int = 0,
    analysis_seconds: float = 600,
    seed: int = 0,
    memory: int | None = None,
    precision: Precision = "float32",
    latency_batch: int = 1,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | None = None,
    callbacks: Iterable[Callback] = (),
) -> PruneResult[GroupRecord] | SparseResult:
    """Removes whole neurons until a share ``rho`` of the parameters (or other costs) is gone; fine-tunes afterwards.

    With ``structured=False`` it masks single weights instead, layer by layer in execution order, the least relevant
    weights of a layer in one round; masks hold through fine-tuning. Weights are the parameters that convolutions and
    linear layers use as they are; ``rho`` is then the share of all weights of convolutions and linear layers, including
    those that are left whole and counting tied ones once, and is met to within one weight; biases, norms and embeddings
    stay and do not count. At least one weight of a tensor stays. Weights are left whole if they are computed (a weight
    norm's), if eval mode does not use them, or if code reads them without calling the module that holds them, where no
    mask of ``torch.nn.utils.prune`` would be applied.

    Where ``torch.distributed`` is initialised, all ranks make this call together and share the work (docs/scaling.md):
    with the same arguments, and loaders that yield the same on all of them, or each a share of the data. All get
    the same result; the first one's ``evaluate`` counts, and it alone calls callbacks, writes and shows progress.

    Args:
        model: any module ``model(x)`` that ``torch.export`` can trace; not modified. The run works on copies, which
            keep and call its hooks. Modules in eval mode inside a model in train mode stay so. Of a model wrapped in
            DistributedDataParallel, DataParallel or AveragedModel, or compiled by torch.compile, the module inside is
            pruned, and all names are of that module. Weight norms are taken off for the run and put back afterwards.
        loader: yields batches (x, y), and can be iterated repeatedly; it should shuffle, since every group of neurons
            or layer begins a new epoch.
        rho: share of what ``target`` names to remove, in (0, 1), met to within one neuron; of the measured latency, to
            within two percent of the whole, or else a warning says what came closest.
        structured: whether to remove whole neurons or mask single weights. With False, ``target``, ``round_to``,
            ``refresh``, ``compensate``, ``compensation_images``, ``analysis_seconds`` and ``latency_batch`` have to
            keep their defaults.
        target: "params", the model's parameters, tied ones once; "macs", all multiply-adds of a forward pass, as torch
            counts them; or "latency", the seconds that a forward pass takes on this machine, in eval mode, with torch's
            number of threads. Networks of several widths are then measured before anything is removed, and the result
            has the times before and after. As measurements vary, so may the widths: the same seed then does not promise
            the same plan, but a checkpoint keeps the widths once they are chosen.
        criterion: the measure of relevance: a name or an object of ``singe.criteria``; "integrated_gradient" by
            default, and for single weights "magnitude". For these it uses the absolute values of the weight and of its
            gradient, on the path that fades the whole layer: names then mean that, and an object needs
            ``path="layer"``; criteria of neurons alone, such as "loss_change", are refused.
        allocation: how rho is shared among groups. "sensitivity", the default, ranks the neurons of all groups by the
            rise of the loss per parameter (or other cost) saved when their group alone loses more and more neurons, in
            the order of first scores and compensated as ``compensate`` says, measured on 256 samples at eight widths;
            "global" ranks them by their first scores. "uniform" removes the same share of neurons everywhere, "linear"
            a share that rises from the first group to the last, "block" one that rises from block to block; a mapping
            {module name or glob: relative rate} sets it for some groups (1 for the others, 0 leaves whole). With
            ``structured=False`` the same holds for weights instead of neurons and tensors instead of groups, with
            "uniform" as the default and without "sensitivity".
        round_to: a layer that loses rows keeps a multiple of this many; one that has no more is left whole.
        max_rate: share of its neurons (or weights) that a group (or tensor) loses at most, in (0, 1], so that no
            ranking narrows a layer to a single neuron; less where ``round_to`` asks for it.
        refresh: after a removal, re-score all of the group ("full", the paper's) or only the least relevant
            candidates until the least is up to date ("lazy").
        compensate: how the layers that read a group are changed once it is pruned, before any later fine-tuning:
            "mean" moves biases (or the means of the batch norms that follow); "least_squares", the default, refits
            weights too, so that on some samples the values after these layers match those of the unpruned network, or,
            with fine-tuning in between, those of the network just before the group was pruned. By least squares all
            layers that a removal reaches are refitted once more after the last group, unless there was fine-tuning in
            between. Batch norms after layers refitted in this way get the statistics of their new inputs, with scales
            and shifts that make up for it. Takes seconds a group, no labels, no gradients. "none" leaves the layers
            unchanged, and is the only choice for single weights.
        compensation_images: number of samples for that.
        finetune: how to train the pruned network, by default after all pruning; None for not at all. For single weights
            ``when="neuron"`` is refused.
        images: number of samples to score on, drawn afresh for every group or layer. Single weights need more of them
            than neurons, whose scores sum up many gradients: a few hundred. ``"sensitivity"`` takes 16 of them to find
            the order in which a group's neurons would be removed.
        loss: (outputs, batch) -> scalar; mean cross-entropy by default.
        forward: (model, batch) -> outputs, for a model not called as ``model(x)``; batches are then any nested tensors.
        ignore: module names or glob patterns; a group with a member among them, or a weight in them, loses no neurons.
            Its layers may still be refitted (see ``compensate``) and trained.
        recalibrate_bn: number of images on which batch norms re-estimate their statistics at the end; 0 for not at all.
        analysis_seconds: how long trial removals on copies may take.
        seed: of everything random in the run; the same seed gives the same plan on the same machine.
        memory: upper bound, in bytes, of the activations of a pass, met where images can be split; 1 GiB by default,
            on a GPU a sixteenth of its memory if that is more.
        precision: of the passes that compute scores, training has its own: "float32", the model's own dtype without
            TF32; "tf32" on CUDA; or "bfloat16", autocast.
        latency_batch: number of samples in the forward pass that ``target="latency"`` measures.
        progress: whether to show progress bars on stderr, where that is a terminal.
        checkpoint: a directory in which the run saves, after every group (or layer) and, in the fine-tuning after all
            of them, where an epoch of the loader ends after 100 steps or more, what it needs to continue from there
            when the same call is made again, in another process too.
            Model, loader and loss have to be the same as well.
        evaluate: (model) -> a number, the higher the better, such as accuracy on test data. Called on copies in eval
            mode, without gradients: of the unpruned network, of the network after every group (or layer), and of the
            result; recorded in ``history`` and in the result. Neither it nor its random draws affect the run.
        callbacks: functions of a record, called with each one (``GroupRecord``, or ``WeightRecord``) as soon as it
            exists; first with those of a checkpoint. They do not affect the run either, but an exception ends it.

    Returns:
        the pruned model with its plan and history; for single weights, with its masks and history.

    Raises:
        TypeError, ValueError: bad input, including a checkpoint that is damaged or of another call, refused before any
            work; or a loss that is not finite during the run.
        OSError: the checkpoint's directory cannot be written to.
        TimeoutError: the trials take longer than ``analysis_seconds``.
        RuntimeError: a rank of ``torch.distributed`` was lost, did not make the call, or decided differently.
    """
    arguments = locals()
    with meeting() as ranks, prepared(NeuronRun, WeightRun, arguments, ranks) as run:
        return run.execute()


@contextmanager
def prepared(
    of_neurons: type[Neurons], of_weights: type[Weights], arguments: Mapping[str, Any], ranks: Ranks
) -> Iterator[Neurons | Weights]:
    """Checks the arguments of :func:`prune`, by name, and makes a run of them, which knows what it will remove.

    Inside, torch and its random state are the run's.
    """
    structured, loader, finetune = (arguments[name] for name in ("structured", "loader", "finetune"))
    if not isinstance(structured, bool):
        raise TypeError(f"expected structured to be True or False, got {structured!r}")
    values.positive("analysis_seconds", arguments["analysis_seconds"])
    model = unwrapped(arguments["model"])
    device = checks.sound_model(model)
    options = _options(arguments, ranks, device)
    if not structured:
        _refuse_of_neurons(options, arguments["analysis_seconds"])
    model = _first_ranks(model, ranks)
    check_precision(options.precision, model, device)
    if finetune is not None and finetune.precision is not None:
        check_precision(finetune.precision, model, device)
    try:
        check_savable(model)
    except ValueError as error:
        if ranks.first:
            log.warning("the result cannot be saved with result.save: %s", error)
    stream = Stream(loader, device, options.task, ranks)
    _warn_of_loader(loader, options)
    with plain_torch(device), preserved_random_state(loader):
        if not structured:
            sparse = of_weights(model, stream, options)
            sparse.rehearse()
            sparse.plan_shares()
            yield sparse
            return
        run = of_neurons(model, stream, options)
        run.rehearse()
        run.plan_widths(arguments["analysis_seconds"])
        yield run


def _options(arguments: Mapping[str, Any], ranks: Ranks, device: torch.device) -> Options:
    """What a run is asked for, with the defaults that depend on what is pruned."""
    a = SimpleNamespace(**arguments)
    allocation = ("sensitivity" if a.structured else "uniform") if a.allocation is None else a.allocation
    criterion = ("integrated_gradient" if a.structured else "magnitude") if a.criterion is None else a.criterion
    compensate: Compensate = "least_squares" if a.structured else "none"
    return Options(
        goal=Goal(a.rho, a.target, allocation, a.round_to, a.ignore, a.latency_batch, a.max_rate),
        criterion=(resolve if a.structured else resolve_elementwise)(criterion),
        compensate=compensate if a.compensate is None else a.compensate, compensation_images=a.compensation_images,
        refresh=a.refresh, finetune=a.finetune, images=a.images,
        task=Task(a.forward, a.loss), recalibrate_bn=a.recalibrate_bn, seed=a.seed,
        precision=a.precision, memory=int(ranks.number(limit(a.memory, device)) or 1),
        progress=a.progress if ranks.first else False, checkpoint=a.checkpoint,
        observer=Observer(a.evaluate, a.callbacks, a.loader, tells=ranks.first), ranks=ranks,
    )  # fmt: skip


def _first_ranks(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model that all ranks prune: a copy with the first one's values where the ranks differ.

    Batch norms differ: DistributedDataParallel leaves each rank with the statistics of its own last batch.
    """
    tensors = named_tensors(model)
    ranks.check_same("model", str([(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]))
    if not (others := ranks.differing("", tensors)):
        return model
    log.warning("weights or statistics on ranks %s are not those of rank 0, which are the ones that are pruned", others)
    model = copy_of(model)
    ranks.synchronise(named_tensors(model))
    return model


def _refuse_of_neurons(options: Options, analysis_seconds: float) -> None:
    """Raises ValueError for arguments that apply only to neurons, where single weights are to be masked."""
    goal, finetune = options.goal, options.finetune
    if options.compensate != "none":
        raise ValueError(f"expected compensate='none' with structured=False, got {options.compensate!r}")
    given = {
        "target": goal.target, "round_to": goal.round_to, "refresh": options.refresh,
        "compensation_images": options.compensation_images, "analysis_seconds": analysis_seconds,
        "latency_batch": goal.latency_batch,
    }  # fmt: skip
    parameters = inspect.signature(prune).parameters
    for name, value in given.items():
        if value != (default := parameters[name].default):
            raise ValueError(
                f"expected {name}={default!r} with structured=False, which does not take it, got {value!r}"
            )
    if finetune is not None and finetune.when == "neuron":
        raise ValueError("expected finetune.when 'layer' or 'after' with structured=False, got 'neuron'")
    if goal.allocation == "sensitivity":
        raise ValueError("expected an allocation other than 'sensitivity' with structured=False")


def _warn_of_loader(loader: Iterable[Any], options: Options) -> None:
    if not options.ranks.first:
        return
    chosen = options.finetune is None and isinstance(loader, (list, tuple))  # these very batches
    if not chosen and not _shuffles(loader):
        log.warning(
            "the loader does not shuffle: all that is measured and refitted is so on its first samples%s; if it is "
            "sorted, by class for example, they do not stand for the others",
            ", which fine-tuning sees again and again, too"
            if options.finetune is not None and options.finetune.when != "after" else "",
        )  # fmt: skip
    if options.checkpoint is not None and getattr(loader, "persistent_workers", False):
        log.warning(
            "the loader's workers persist, and torch does not seed them again: a run that continues from its "
            "checkpoint sees other samples if they draw at random; try persistent_workers=False"
        )


def _shuffles(loader: Iterable[Any]) -> bool:
    """False only for loaders that are known to give the same batches in every epoch."""
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None) if batches is not None else getattr(loader, "sampler", None)
    return not isinstance(loader, (list, tuple)) and not isinstance(sampler, SequentialSampler)
