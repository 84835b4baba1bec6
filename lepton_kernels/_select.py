"""Which layers of a model a call is about: names, globs over names, types and callables."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

Selector = str | type | Callable[[str, nn.Module], bool]


def matches(selector: Selector, name: str, module: nn.Module) -> bool:
    """Whether a name, a glob over names, a type or a callable picks a module."""
    if isinstance(selector, str):
        return fnmatch.fnmatchcase(name, selector) or name.endswith("." + selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(name, module))


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """named_children, a module that stands at several places at all of them."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def sites_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """(parent, attribute, full name, module) of every submodule, shared ones at each place."""
    for prefix, parent in model.named_modules():
        for attribute, child in children_of(parent):
            yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def check_selectors(
    function: str, argument: str, selectors: Sequence[Selector], sites: list[tuple[str, nn.Module]]
) -> None:
    for selector in selectors:
        if not any(matches(selector, name, module) for name, module in sites):
            examples = ", ".join(name for name, _ in sites[:5])
            raise ValueError(
                f"{function}: {argument} holds {selector!r}, which matches no layer; layers here: {examples}, ..."
            )


def as_selectors(argument: Sequence[Selector] | Selector | None) -> list[Selector]:
    """A list of selectors from one of them, a sequence, or None."""
    if argument is None:
        return []
    if isinstance(argument, (str, type)) or callable(argument):
        return [argument]
    return list(argument)
