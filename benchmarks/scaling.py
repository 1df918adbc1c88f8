#!/usr/bin/env python
"""What a TraceRL step would take on 8 to 1,024 devices, and where it stops scaling.

    python -m benchmarks.scaling                                    # all tables, on the screen
    python -m benchmarks.scaling --write docs/scaling.md            # renews the tables in that file
    python -m benchmarks.scaling --hardware ours.yaml --png scaling.png
    python -m benchmarks.scaling --calibrate > ours.yaml            # measures this machine, CPU or GPU
    python -m benchmarks.scaling --compare                          # predicted against measured, one process

Nothing here runs a large model: the costs are those of `megatron_dlm.planning`, for the best layout of each point.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from benchmarks.rl_report import markdown
from benchmarks.scaling_search import Best, Search
from megatron_dlm.config.errors import UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning.hardware import Hardware, hardware_named
from megatron_dlm.planning.layout import Workload, lengths

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
MODELS = ("sdar-1.7b", "sdar-4b", "sdar-8b", "sdar-30b-a3b")
LENGTHS = (2048, 8192, 32768)
AT = 64  # devices of the points that are looked at more closely, and from which weak scaling goes out
SHORT_OF_MEMORY = "does not fit"


def workload(longest: int, prompts: int = 128, **changes: object) -> Workload:
    """A step as published for TraceRL with an 8B model (arXiv 2509.06949, section 5 and table 4): 128 prompts of 32
    responses, 2.4 tokens per denoising step. Ours: responses have 0.3 of the longest length on average, half of them is
    learned from, in 16 updates (so 128 responses each), prompts have 256 tokens; the
    loss head is Triton's kernels, as `plan` has it.
    """
    plain = dict(
        prompts=prompts, samples=32, prompt_length=256, responses=lengths(0.3 * longest, longest), block_size=4,
        steps_per_block=4 / 2.4, updates=16, learned=0.5, triton_head=True,
    )  # fmt: skip
    return Workload(**{**plain, **changes})


def layout_name(best: Best) -> str:
    layout = best.layout
    parts = [f"{name}{size}" for name in ("tp", "pp", "vpp", "cp", "ep") if (size := getattr(layout, name)) > 1]
    extra = [f"engine tp{layout.engine_tp}"] if layout.engine_tp != layout.tp else []
    recomputed = ["recompute"] if layout.recompute == "full" else []
    return " ".join(parts + extra + recomputed) or "data only"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def curve(search: Search, worlds: Sequence[int], longest: int, weak: bool) -> dict[int, Best | None]:
    """The best layouts over numbers of devices. Args: weak: prompts grow with them."""
    return {
        world: search.best(world, workload(longest, max(1, 128 * world // AT) if weak else 128)) for world in worlds
    }


def table(points: dict[int, Best | None], weak: bool) -> str:
    """One curve. Efficiency: tokens per second and device, of those of the smallest job that fits."""
    lines = [
        (
            "devices",
            "step, s",
            "rollout",
            "old log-probs",
            "train",
            "refit",
            "tokens/s",
            "efficiency, %",
            "bound",
            "layout",
        )
    ]
    first = None
    for world, best in points.items():
        if best is None:
            lines.append((f"{world:,}", SHORT_OF_MEMORY, *[""] * 8))
            continue
        cost = best.cost
        speed = cost.tokens / cost.seconds
        first = first or speed / world
        phases = ("rollout", "old_logprobs", "train", "refit")
        taken = [_seconds(cost.phases[name].seconds) if name in cost.phases else "0" for name in phases]
        lines.append(
            (
                *(f"{world:,}", _seconds(cost.seconds)),
                *taken,
                *(f"{speed:,.0f}", f"{100 * speed / world / first:.0f}", ": ".join(cost.bound), layout_name(best)),
            )
        )
    return markdown(lines)


def overview(curves: dict[tuple[str, int], dict[int, Best | None]]) -> str:
    """Seconds of a step over devices, all models and lengths; and the largest job that keeps half of the efficiency."""
    worlds = list(next(iter(curves.values())))
    lines = [("model", "longest", *(f"{world:,}" for world in worlds), "half efficient up to")]
    for (model, longest), points in curves.items():
        speeds = {world: best.cost.tokens / best.cost.seconds / world for world, best in points.items() if best}
        first = next(iter(speeds.values()), 0.0)
        good = [world for world, speed in speeds.items() if speed >= first / 2]
        cells = [_seconds(best.cost.seconds) if best else "-" for best in points.values()]
        lines.append((model, f"{longest:,}", *cells, f"{max(good):,}" if good else "-"))
    return markdown(lines)


def spent(curves: dict[tuple[str, int], dict[int, Best | None]], worlds: Iterable[int]) -> str:
    """What the seconds of a step go to, in percent, over all phases; how long engines work, and how full rows are."""
    names = ("products", "weights", "keys and values", "attention", "memory", "starts", "tensor", "experts", "context")
    names += ("pipeline", "bubble", "data", "optimizer", "refit")
    lines = [("model", "longest", "devices", *names, "engines' time", "rows filled")]
    for (model, longest), points in curves.items():
        for world in worlds:
            best = points.get(world)
            if best is None:
                continue
            parts: dict[str, float] = {}
            for phase in best.cost.phases.values():
                for name, seconds in phase.parts.items():
                    parts[name] = parts.get(name, 0.0) + seconds
            parts["products"] = parts.get("products", 0.0) + parts.pop("prompts", 0.0)
            share = [f"{100 * parts.get(name, 0.0) / best.cost.seconds:.0f}" for name in names]
            even = best.cost.phases["rollout"].facts["mean over engines of their time, of the slowest"]
            filled = best.cost.phases["train"].facts["filled"]
            lines.append((model, f"{longest:,}", f"{world:,}", *share, f"{100 * even:.0f}", f"{100 * filled:.0f}"))
    return markdown(lines)


def choices(search: Search, longest: int) -> str:
    """One point, and what one choice at a time changes."""
    base = workload(longest)
    changed = {
        "as above": base,
        "attention over whole squares (--attention-backend dense)": dataclasses.replace(base, attention="dense"),
        "one update": dataclasses.replace(base, updates=1),
        "old log-probs of the rollout": dataclasses.replace(base, old_logprobs="rollout"),
        "a value model": dataclasses.replace(base, value_model=True, together=True),
        "one token per step": dataclasses.replace(base, steps_per_block=4.0),
        "at most 64 responses in flight": dataclasses.replace(base, max_running=64),
    }
    lines = [("change", "step, s", "rollout", "training", "layout")]
    for name, work in changed.items():
        best = search.best(AT, work)
        if best is None:
            lines.append((name, SHORT_OF_MEMORY, "", "", ""))
            continue
        rollout = best.cost.phases["rollout"].seconds
        rest = best.cost.seconds - rollout
        lines.append((name, _seconds(best.cost.seconds), _seconds(rollout), _seconds(rest), layout_name(best)))
    return markdown(lines)


def between_markers(text: str, name: str, body: str) -> str:
    """The text with what stands between the comments of a name replaced.

    Raises:
        ValueError: the text does not have them.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the file has no {begin} ... {end}")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n\n{body}\n\n{end}{rest.split(end, 1)[1]}"


def draw(curves: dict[str, dict[tuple[str, int], dict[int, Best | None]]], path: Path) -> None:
    """Tokens per second over devices, strong and weak, one line per model and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(7 * len(curves), 5), layout="constrained", squeeze=False)
    styles = dict(zip(LENGTHS, ("-", "--", ":")))
    colours = {model: f"C{n}" for n, model in enumerate(MODELS)}
    for axis, (kind, found) in zip(axes[0], curves.items()):
        for (model, longest), points in found.items():
            known = {world: best.cost.tokens / best.cost.seconds for world, best in points.items() if best}
            axis.loglog(
                list(known), list(known.values()), styles.get(longest, "-"), color=colours.get(model), marker=".",
                label=f"{model}, {longest:,}",
            )  # fmt: skip
        axis.set(title=f"{kind} scaling", xlabel="devices", ylabel="response tokens per second")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def study(hardware: Hardware, models: Sequence[str], longest: Sequence[int], worlds: Sequence[int]):
    """Yields (name, Markdown) of each table, then ('curves', all of them)."""
    strong, weak = {}, {}
    for model in models:
        search = Search(resolve(ModelConfig(model_preset=model), None), hardware)
        for length in longest:
            strong[model, length] = curve(search, worlds, length, weak=False)
        weak[model, longest[0]] = curve(search, worlds, longest[0], weak=True)
    yield "strong scaling", overview(strong)
    yield "weak scaling", overview(weak)
    looked_at = "sdar-8b" if "sdar-8b" in models else models[0]
    yield "one model", table(strong[looked_at, longest[0]], weak=False)
    yield "one model, long responses", table(strong[looked_at, longest[-1]], weak=False)
    yield "one model, weak", table(weak[looked_at, longest[0]], weak=True)
    ends = sorted({worlds[0], AT if AT in worlds else worlds[0], worlds[-1]})
    yield (
        "where the time goes",
        spent({key: strong[key] for key in strong if key[1] in (longest[0], longest[-1])}, ends),
    )
    search = Search(resolve(ModelConfig(model_preset=looked_at), None), hardware)
    yield "choices", choices(search, longest[min(1, len(longest) - 1)])
    yield "curves", {"strong": strong, "weak": weak}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.calibrate or options.compare:
        from benchmarks import calibrate

        return calibrate.main(options.compare, options.device)
    try:
        hardware = hardware_named(options.hardware)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for name, body in study(hardware, options.models, options.lengths, options.worlds):
        if name == "curves":
            if options.json:
                Path(options.json).write_text(json.dumps(figures(body), indent=1) + "\n")
            if options.png:
                draw(body, Path(options.png))
            continue
        if options.write:
            path = Path(options.write)
            path.write_text(between_markers(path.read_text(), name, body))
        print(f"{name}\n\n{body}\n", flush=True)
    return 0


def figures(curves: dict[str, dict[tuple[str, int], dict[int, Best | None]]]) -> list[dict]:
    """Every point, for programs."""
    return [
        {
            "scaling": kind,
            "model": model,
            "longest": longest,
            "devices": world,
            "layout": dataclasses.asdict(best.layout),
            "row_budget": best.workload.row_budget,
            "seconds": best.cost.seconds,
            "phases": {name: dict(phase.parts) for name, phase in best.cost.phases.items()},
        }
        for kind, found in curves.items()
        for (model, longest), points in found.items()
        for world, best in points.items()
        if best is not None
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A TraceRL step over numbers of devices.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--hardware", default="h100", help="a name of megatron_dlm/planning/hardware.py, or a YAML file")
    add("--models", nargs="+", default=list(MODELS), help="model presets")
    add("--lengths", nargs="+", type=int, default=list(LENGTHS), help="longest responses")
    add("--worlds", nargs="+", type=int, default=list(WORLDS), help="numbers of devices")
    add("--write", metavar="FILE", help="renew the tables between the comments in this Markdown file")
    add("--png", metavar="FILE", help="draw the curves (needs matplotlib)")
    add("--json", metavar="FILE", help="write all points")
    add("--calibrate", action="store_true", help="measure this machine and print it as YAML for --hardware")
    add("--compare", action="store_true", help="measure it, run a small model, and print predicted over measured")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of --calibrate and --compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
