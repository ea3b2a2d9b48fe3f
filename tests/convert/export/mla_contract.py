"""By which structure vLLM's Transformers backend (0.33) takes an attention module for latent attention; our own check.

Elsewhere it caches keys and values of every head. `broken(module)` names the rules that a module breaks:

1. its config has one whole kv_lora_rank, and it knows its layer;
2. one linear of a forward input is followed by a norm over a part of its outputs (and at most one by a norm over all);
3. that norm is an RMSNorm in its operations, with eps in an attribute;
4. one other linear, the queries', reads a forward input;
5. a linear reads the norm's output, and a linear's output is what is returned;
6. forward expands latent and rotary key in one call `self.<method>(a, b)` of a method that applies that linear and
   returns pairs;
7. forward calls the attention interface once, with a scaling that can be read off the module.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

INTERFACE = "contract"  # the name of an attention implementation that leaves a mark in the graph


class LeafTracer(fx.Tracer):
    """Traces a forward whose children are single nodes and whose keyword arguments are none."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter(()) if obj.node.target == "keys" else super().iter(obj)


def interface(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """An attention that is traced and not computed."""
    return query.tracer.create_proxy("call_function", interface, (query, key, value), {})


def graph_of(module: Any) -> fx.Graph | None:
    """The graph of `module.forward` without a cache; None where its source cannot be traced."""
    concrete = {"past_key_values": None, "attention_mask": None}
    names = inspect.signature(type(module).forward).parameters
    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, interface)
    config = getattr(module, "config", None)
    before = getattr(config, "_attn_implementation", None)
    try:
        if config is not None:
            config._attn_implementation = INTERFACE
        return LeafTracer().trace(module, {n: value for n, value in concrete.items() if n in names})
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError):
        return None
    finally:
        if config is not None:
            config._attn_implementation = before


def broken(module: Any) -> set[int]:
    """The numbers of the rules that an attention module breaks. All of the graph's where there is no graph."""
    function = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward))).body[0]
    found = set()
    if type(getattr(module.config, "kv_lora_rank", None)) is not int or type(module.layer_idx) is not int:
        found.add(1)
    graph = graph_of(module)
    up = None
    if graph is None:
        found |= {2, 3, 4, 5}
    else:
        up = _graph_rules(module, graph, found)
    if len(_expansions(module, function, up)) != 1:
        found.add(6)
    if not _one_interface_call(module, function):
        found.add(7)
    return found


def _graph_rules(module: Any, graph: fx.Graph, found: set[int]) -> str | None:
    """Adds the broken rules among 2 to 5; returns the name of the linear that expands the latent."""
    linears = [n for n in graph.nodes if _is_linear(module, n)]
    readers = {n for n in linears if isinstance(n.args[0], fx.Node) and n.args[0].op == "placeholder"}
    chains = []
    for node in graph.nodes:
        source = _upstream(module, node) if node.op == "call_module" and node not in linears else None
        if source in readers:
            chains.append((source, node))
    narrow = [c for c in chains if _width(module, c[1]) != module.get_submodule(c[0].target).out_features]
    if len(narrow) != 1 or len(chains) > 2:
        found |= {2, 3, 4, 5}
        return None
    norm = narrow[0][1]
    if not is_rms_norm(module.get_submodule(norm.target)):
        found.add(3)
    if len(readers) != 2:
        found.add(4)
    up = _downstream(module, norm)
    [output] = [n for n in graph.nodes if n.op == "output"]
    first = output.args[0][0] if isinstance(output.args[0], tuple) else output.args[0]
    if up is None or up in readers or not _is_linear(module, first) or first in readers | {up}:
        found.add(5)
    return up.target if up is not None else None


def is_rms_norm(norm: nn.Module) -> bool:
    """Whether it computes weight · (x · rsqrt(mean(x²) + eps)) by these operations, eps a float of its own."""
    graph, weight = graph_of(norm), getattr(norm, "weight", None)
    if graph is None or weight is None:
        return False
    names = {getattr(n.target, "__name__", n.target) for n in graph.nodes}
    constants = {a for n in graph.nodes if _named(n, "add") for a in n.args if isinstance(a, float)}
    eps = [value for value in constants if value in vars(norm).values()]
    [last] = [n.args[0] for n in graph.nodes if n.op == "output"]
    while _named(last, "to"):
        last = last.args[0]
    if len(eps) != 1 or not {"mean", "rsqrt"} <= names or not _named(last, "mul"):
        return False
    x = torch.randn(5, len(weight), generator=torch.Generator().manual_seed(0)) * eps[0] ** 0.5
    expected = weight * x / (x.square().mean(-1, keepdim=True) + eps[0]).sqrt()
    return torch.allclose(norm(x), expected, rtol=1e-5)  # float32


def _named(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and name in (node.target, getattr(node.target, "__name__", ""))


def _is_linear(module: Any, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(module.get_submodule(node.target), nn.Linear)
    )


def _width(module: Any, node: fx.Node) -> int:
    weight = getattr(module.get_submodule(node.target), "weight", None)
    return weight.numel() if weight is not None else -1


def _upstream(module: Any, node: fx.Node) -> fx.Node | None:
    """The nearest linear that the first argument of `node` comes from."""
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and not _is_linear(module, source):
        source = source.args[0] if source.args else None
    return source if isinstance(source, fx.Node) else None


def _downstream(module: Any, node: fx.Node) -> fx.Node | None:
    """The nearest linear that reads what comes from `node`, without attention between."""
    reached = list(node.users)
    for user in reached:
        if _is_linear(module, user):
            return user
        reached += [] if user.target is interface else [n for n in user.users if n not in reached]
    return None


def _expansions(module: Any, function: ast.AST, up: str | None) -> list[ast.Call]:
    """Calls `self.<method>(a, b)` of a method of two inputs that applies `up` and always returns a pair."""

    def expands(name: str) -> bool:
        method = getattr(type(module), name, None)
        if method is None or method.__code__.co_argcount != 3 or up not in method.__code__.co_names:
            return False
        body = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
        values = [node.value for node in body if isinstance(node, ast.Return)]
        return bool(values) and all(isinstance(v, ast.Tuple) and len(v.elts) == 2 for v in values)

    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    own = [c for c in calls if isinstance(c.func, ast.Attribute) and ast.unparse(c.func.value) == "self"]
    return [c for c in own if len(c.args) == 2 and not c.keywords and expands(c.func.attr)]  # type: ignore[attr-defined]


def _one_interface_call(module: Any, function: ast.AST) -> bool:
    """Whether what was looked up in ALL_ATTENTION_FUNCTIONS is called once, and its scaling is a number."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS"):
                names |= {ast.unparse(target) for target in targets}
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) in names]
    scalings = [k.value for call in calls for k in call.keywords if k.arg == "scaling"]
    if len(calls) != 1 or len(scalings) != 1:
        return False
    [scaling] = scalings
    if isinstance(scaling, ast.Attribute) and ast.unparse(scaling.value) == "self":
        return type(getattr(module, scaling.attr, None)) in (int, float)
    return isinstance(scaling, ast.Constant) and type(scaling.value) in (int, float)
