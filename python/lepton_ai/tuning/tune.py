"""tune: the choice for each layer that makes a model smallest, fastest or cheapest within a budget."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from lepton_ai.compression import Choice, Recipe
from lepton_ai.cost import cost_per_million
from lepton_ai.fidelity import listed
from lepton_ai.model import LeptonModel
from lepton_ai.tuning.budget import Budget
from lepton_ai.tuning.candidates import CANDIDATES, CAUTIOUS, STEPS, coded, made, tunable_layers
from lepton_ai.tuning.latency import latencies
from lepton_ai.tuning.result import OBJECTIVES, Point, TuneResult
from lepton_ai.tuning.search import Option, front
from lepton_ai.tuning.sensitivity import LayerCall, recorded, sensitivities
from lepton_ai.tuning.workbench import Workbench
from lepton_kernels import QuantScheme
from lepton_kernels._progress import progress
from lepton_kernels.sparse.calibration import call, evaluating

# One scheme for all layers, as Quantization makes it: what a tuned model is compared with.
SINGLE_SCHEMES = (
    Choice(),
    *(Choice(scheme) for scheme in ("w8a8", "w8a16", "w7a8", "w6a8", "w4a8", "w4a16")),
    *(Choice("w8a8", step=step) for step in STEPS if 0 < step <= 0.28),
)
_SECONDARY = 0.05  # what a share of the time counts beside one of the bytes where size is minimized, and the reverse
_FINAL = 3  # times as long as on the way are the original, the best single scheme and the chosen one timed, each
_Choices = tuple[Choice, ...]  # one for each layer of a unit


def _single_recipe(choice: Choice, layers: Mapping[str, nn.Module]) -> Recipe:
    """What Quantization makes of these layers with the choice's scheme."""
    eight = choice.scheme is None or QuantScheme.of(choice.scheme).stored_bits == 8
    others = choice if choice.scheme is None else Choice("w8a8")  # of recurrent layers
    kinds = {nn.Linear: choice, nn.Embedding: choice if eight else Choice("w8a8")}
    return Recipe({name: kinds.get(type(layer), others) for name, layer in layers.items()})


def _units(layers: Mapping[str, nn.Module], calls: Mapping[str, list[LayerCall]], together: bool) -> list[list[str]]:
    """The layers in groups that take one choice: with `together` those given the same tensors, since they can be one
    product, else each alone."""
    units: dict[object, list[str]] = {}
    for name, found in calls.items():
        tensors = tuple(id(tensor) for made in found for tensor in made.inputs)
        units.setdefault((type(layers[name]), tensors) if together and tensors else name, []).append(name)
    return list(units.values())


@dataclass
class _Search:
    """What the search is made of: the units, what each may become, and the layers of which nothing is known."""

    units: list[list[str]]
    options: list[list[Option[_Choices]]]
    unknown: list[str]


def _search(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    candidates: Mapping[type[nn.Module], Sequence[Choice]],
    inputs: Sequence[Any],
    example: Any,
    whole: Point,
    minimize: str,
    probes: int,
    seed: int,
    directions: bool,
) -> _Search:
    """whole: the model as it is; costs are in shares of its bytes and time."""
    replacements: dict[str, dict[Choice, nn.Module]] = {}
    sizes: dict[str, dict[Choice, int]] = {}
    with evaluating(model):
        for name in progress(list(layers), "candidates"):
            replacements[name], sizes[name] = {}, {}
            for choice in candidates[type(layers[name])]:
                replacement = made(layers[name], choice)
                smallest, size = coded(replacement, choice)
                replacements[name][smallest], sizes[name][smallest] = replacement, size
        with recorded(layers) as calls:
            call(model, example)
        seconds = latencies(layers, replacements, calls)
        errors, unknown = sensitivities(model, replacements, inputs, probes, seed, directions)
    for name in unknown:
        cautious = [choice for choice in replacements[name] if replace(choice, codec="huffman") in CAUTIOUS]
        replacements[name] = {choice: replacements[name][choice] for choice in cautious or list(replacements[name])[:1]}
    size_counts, time_counts = (1.0, _SECONDARY) if minimize == "size" else (_SECONDARY, 1.0)

    def option(layer_choices: Sequence[tuple[str, Choice]]) -> Option[_Choices]:
        size = sum(sizes[name][choice] for name, choice in layer_choices)
        took = sum(seconds[name][choice] for name, choice in layer_choices)
        cost = size_counts * size / whole.file_bytes + time_counts * took / whole.seconds
        error = sum(errors[name][choice] for name, choice in layer_choices)
        return Option(tuple(choice for _, choice in layer_choices), cost, error)

    known = {name: layer for name, layer in layers.items() if name not in unknown}
    units = _units(known, {name: calls[name] for name in known}, together=minimize != "size")
    units += [[name] for name in unknown]
    options = []
    for names in units:
        by_layer = [[(name, choice) for choice in replacements[name]] for name in names]
        options.append([option(each) for each in zip(*by_layer, strict=True)])
    return _Search(units, options, unknown)


def _check(
    model: nn.Module, budget: Budget, minimize: str, metric: object, price_per_hour: float | None, probes: int
) -> None:
    budget.check_metric(metric is not None)
    if minimize not in OBJECTIVES:
        raise ValueError(f"tune: minimize is {minimize!r}; allowed: {', '.join(OBJECTIVES)}")
    if minimize == "cost" and price_per_hour is None:
        raise ValueError("tune: price_per_hour is None with minimize 'cost'; allowed: a number, in any currency")
    if price_per_hour is not None:
        cost_per_million(0.0, price_per_hour)
    if probes < 1:
        raise ValueError(f"tune: probes is {probes}; allowed: 1 or more")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("tune: the model has tensors on the meta device; allowed: a model with its weights")


def tune(
    model: LeptonModel | nn.Module,
    inputs: Iterable[Any],
    budget: str | Budget = "cosine>=0.995",
    minimize: str = "size",
    *,
    metric: Callable[[nn.Module], float] | None = None,
    example: Any = None,
    candidates: Mapping[type[nn.Module], Sequence[Choice]] = CANDIDATES,
    price_per_hour: float | None = None,
    seconds: float = 1.0,
    probes: int = 8,
    seed: int = 0,
) -> TuneResult:
    """Finds the recipe that makes `model` smallest ("size"), fastest ("latency") or cheapest ("cost") within a budget.

    For every layer that quantize_ takes and every candidate it measures the bytes in the file, the time on the layer's
    inputs, and by a few backward passes what the candidate costs (sensitivity.py). A Lagrangian relaxation (search.py)
    gives the recipes that are best for each sum of such errors; the last of them whose model, made and measured, keeps
    the budget is the tuned one. It is chosen unless one choice for all layers, among the candidates, is better. Layers
    given the same tensor take one choice where time is minimized. Layers that the inputs do not reach stay or become
    w8a8, and are told. `model` is not changed.

    inputs: model inputs, as output_vectors has them, from where the model will work: the budget holds on these.
    budget: "cosine>=0.995", "cosine_min>=0.95", "sqnr>=20", or with `metric`, which is called with a model and returns
    a number, any name ("accuracy>=0.9"). example: the input that is timed; None is the first one. candidates: by type
    of layer. price_per_hour: of this machine; "cost" needs it. seconds: for which each model is timed beside the
    original. probes, seed: of the sensitivities.
    Memory: every candidate of every layer is held for a while, some 25 bytes a weight, of which the allocator may keep
    as much again and more; and `probes` gradients of what every layer gives for one input. Raises ValueError for a
    value that is not allowed, a model without layers to tune or without a gradient, and where the model as it is does
    not keep the budget.
    """
    start = time.perf_counter()
    wanted = Budget.of(budget)
    original = model if isinstance(model, LeptonModel) else LeptonModel(model)
    _check(original.model, wanted, minimize, metric, price_per_hour, probes)
    items = listed("tune", inputs)
    timed = items[0] if example is None else example
    layers = tunable_layers(original.model, candidates)
    bench = Workbench(original, items, timed, wanted, metric, seconds)
    unchanged = bench.point("the model as it is", None)
    if not wanted.holds(unchanged.value):
        raise ValueError(f"tune: budget is {wanted}; the model as it is has {unchanged.value:g}")

    directions = metric is None and wanted.sees_directions
    search = _search(
        original.model, layers, candidates, items, timed, unchanged, minimize, probes, seed, directions
    )  # fmt: skip
    states = front(search.options)
    tuned: dict[int, Point] = {}

    def keeps_budget(place: int) -> bool:
        chosen = zip(search.units, (option.choice for option in states[place]), strict=True)
        recipe = Recipe({name: choice for unit in chosen for name, choice in zip(*unit, strict=True)})
        estimate = sum(option.error for option in states[place])
        tuned[place] = bench.point(f"tuned, estimated error {estimate:.3g}", recipe)
        return wanted.holds(tuned[place].value)

    # The metric falls along the states but for noise. Those measured on the way are the front's other points.
    keeps, breaks = 0, len(states)
    while breaks - keeps > 1:
        middle = (keeps + breaks) // 2
        keeps, breaks = (middle, breaks) if keeps_budget(middle) else (keeps, middle)
    if keeps not in tuned:
        keeps_budget(keeps)

    singles = []
    for choice in progress(SINGLE_SCHEMES, "single schemes"):
        recipe = _single_recipe(choice, layers)
        allowed = all(recipe.layers[name] in (Choice(), *candidates[type(layer)]) for name, layer in layers.items())
        singles.append(bench.point(str(choice), recipe, single=True, allowed=allowed))
    result = TuneResult.of(
        wanted, minimize, [unchanged, *singles, *tuned.values()], price_per_hour, unreached=search.unknown
    )  # fmt: skip
    result.time_again(partial(bench.timed_again, seconds=_FINAL * seconds), bench.gpus)
    result.took = time.perf_counter() - start
    return result
