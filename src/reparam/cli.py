"""The command line: it parses, calls and prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ._version import __version__
from .errors import ReparamError


class _Parser(argparse.ArgumentParser):
    """argparse, whose own errors also leave through exit code 2 and name the help."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}\nSee {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reparam",
        description="The toolkit for what a diffusion model predicts.",
        epilog="Example: reparam study spiral --out runs/spiral",
    )
    parser.add_argument("--version", action="version", version=f"reparam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (
        _add_study,
        _add_train,
        _add_prepare,
        _add_average,
        _add_sample,
        _add_eval,
        _add_check,
        _add_identify,
        _add_basis,
        _add_convert,
        _add_report,
        _add_show,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, summary: str, example: str, call: Callable[[Any], int]) -> Any:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"Example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=call)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, the rest on standard error"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_study(commands: Any) -> None:
    parser = _command(
        commands,
        "study",
        "compare prediction targets on the same network, data, budget and noise",
        "reparam study spiral --out runs/spiral --set train.steps=500",
        _study,
    )
    parser.add_argument(
        "recipe", nargs="?", help="a built-in recipe or a YAML file; without it the built-in ones are listed"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write; runs/NAME by default. An unfinished study there is continued",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a key of the recipe; repeatable; a list is a sweep",
    )
    parser.add_argument("--tiny", action="store_true", help="the small version of the recipe, for minutes on a core")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="TARGET",
        help="compare this target too: a name, '{name: k, k: 0.3}', or a .py file with compute_training_target and "
        "predict_x0; repeatable",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; by default one a core, or one a GPU")
    parser.add_argument("--device", help="cpu, cuda or mps; the best there is by default")
    parser.add_argument(
        "--on",
        default="local",
        metavar="WHERE",
        help="local (the default), or ray: the cluster at RAY_ADDRESS, or one started on this machine for the study",
    )
    parser.add_argument(
        "--per-run",
        metavar="MAPPING",
        help="what a run asks of the cluster: '{num_cpus: 8, num_gpus: 0.5}'; by default one GPU where there are any, "
        "and the cores divided among the runs",
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip and count pictures that cannot be read")
    parser.add_argument("--estimate", action="store_true", help="say what it would cost, and stop")


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "train one model for as long as it takes, on one process or many; stop and continue at will",
        "torchrun --nproc-per-node 8 -m reparam.cli train recipe.yaml --out runs/mine",
        _train,
    )
    parser.add_argument("recipe", nargs="?", help="a built-in recipe, a YAML file, or the recipe.yaml of a run")
    parser.add_argument(
        "--add-confidence",
        metavar="RUN",
        help="in place of a recipe, a finished run: its network stays as it is, and one beside it learns the variance",
    )
    parser.add_argument(
        "--init",
        metavar="RUN",
        help="begin with the network of a finished run, or a .safetensors file, stated as this training's target; what "
        "the recipe leaves out is that run's, and without a recipe all but the target",
    )
    parser.add_argument("--target", help="what to predict, in the recipe's place: v, '{name: k, k: 0.3}' …")
    parser.add_argument("--tiny", action="store_true", help="the small version of the recipe, for minutes on a core")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write; runs/NAME by default. An unfinished training there is continued"
    )
    parser.add_argument("--run", metavar="NAME", help="which run of a recipe that compares several")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a key of the recipe; repeatable"
    )
    parser.add_argument("--device", help="cpu, cuda or mps; the best there is by default")
    parser.add_argument(
        "--save-every", type=float, default=10.0, metavar="MIN", help="minutes between checkpoints (10)"
    )
    parser.add_argument("--keep", type=int, default=2, metavar="K", help="checkpoints that are kept (2)")
    parser.add_argument(
        "--tracker", default="tensorboard", metavar="NAME", help="where curves go: tensorboard, wandb …, or none"
    )
    parser.add_argument(
        "--previews", type=int, default=16, metavar="N", help="samples drawn at each validation, of pictures (16)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip and count pictures that cannot be read")
    parser.add_argument("--estimate", action="store_true", help="say what it would cost, and stop")


def _add_prepare(commands: Any) -> None:
    parser = _command(
        commands,
        "prepare",
        "cut pictures to one size, or encode them by a VAE, once, for training to read",
        "reparam prepare imagenet/train --out imagenet-256 --size 256",
        _prepare,
    )
    parser.add_argument("data", help="a folder, .zip, .tar or .parquet file of pictures, or hub:OWNER/NAME")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the folder to write; an unfinished one is continued"
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="the side of the square pictures")
    parser.add_argument(
        "--vae", metavar="DIR", help="write the latents of this local diffusers VAE instead of pictures"
    )
    parser.add_argument("--dtype", default="float16", help="of the latents: float16 (the default), bfloat16 or float32")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; one a core by default")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count pictures that cannot be read")
    parser.add_argument("--labels", help="where the classes are: a column, or none")
    parser.add_argument("--column", help="which column holds the pictures")
    parser.add_argument("--hub", metavar="DIR", help="a local folder of hub data sets, OWNER/NAME below it")
    parser.add_argument("--shard", type=int, metavar="N", help="pictures a shard")
    parser.add_argument("--batch", type=int, default=16, help="pictures that the VAE encodes at a time (16)")
    parser.add_argument("--device", help="where the VAE runs: cpu, cuda or mps; the best there is by default")


def _add_average(commands: Any) -> None:
    parser = _command(
        commands,
        "average",
        "make the averaged network of any width from the snapshots that a training kept",
        "reparam average runs/mine --width 0.08",
        _average,
    )
    parser.add_argument("run", help="the folder of a training with train.ema_widths")
    parser.add_argument("--width", type=float, required=True, help="relative width of the average, such as 0.08")
    parser.add_argument("--step", type=int, help="of which step; the last by default")
    parser.add_argument("--out", metavar="FILE", help="average-WIDTH.safetensors in the folder by default")
    parser.add_argument("--allow-inexact", action="store_true", help="write what the snapshots hold only roughly")


def _add_sample(commands: Any) -> None:
    parser = _command(
        commands,
        "sample",
        "draw samples from a trained run or official JiT weights, as many as it takes",
        "reparam sample runs/spiral/dim2-x0 --n 64; reparam sample --official jit-b16.pth --model JiT-B/16 --n 50000 "
        "--out samples.zip",
        _sample,
    )
    parser.set_defaults(refuse=parser.error)
    parser.add_argument("run", nargs="?", help="the folder of a run, or a .safetensors file")
    parser.add_argument(
        "--n", "--count", type=int, default=64, metavar="N", help="how many (64); --count where torchrun would hear --n"
    )
    parser.add_argument(
        "--out",
        metavar="PLACE",
        help="where to write: of pictures a folder of PNGs, or what ends in .zip, .parquet or .npz, and a grid of the "
        "first beside it; else an array in .npz; samples-N-seedS in the run's folder by default. The same command "
        "continues what was stopped",
    )
    parser.add_argument(
        "--batch", type=int, metavar="B", help="how many at a time, by each process; as many as usually fit by default"
    )
    parser.add_argument("--label", metavar="CLASS", help="a class, by name or number; all in turn by default")
    parser.add_argument("--guidance", type=float, metavar="W", help="weight of classifier-free guidance; 1 is none")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the times t where guidance is applied"
    )
    parser.add_argument(
        "--sampler",
        help="a sampler: heun, ddim, dpmpp_2m, '{name: ddim, eta: 1}' …; the recipe's by default, else heun",
    )
    parser.add_argument("--steps", type=int, help="sampling steps; the recipe's by default, else 50")
    parser.add_argument("--grid", help="its times: linear, log_snr, karras, '{name: shifted, shift: 3}' …")
    parser.add_argument("--threshold", metavar="HOW", help="keep x0 in the range of pictures: static or dynamic")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--device", help="cpu, cuda or mps; the best there is by default")
    parser.add_argument(
        "--precision",
        default="float32",
        metavar="HOW",
        help="what the network computes in: float32 (the default: the same samples on any machine, to rounding), tf32 "
        "or bf16 (faster on a GPU, and other samples); all else is float32 always",
    )
    parser.add_argument(
        "--compile", action="store_true", help="run the network through torch.compile: for many samples"
    )
    _add_spec(parser)
    group = parser.add_argument_group("official JiT weights")
    group.add_argument(
        "--official",
        metavar="FILE",
        help="of weights, .safetensors, .pth or .pt (of which tensors and plain data alone are read)",
    )
    group.add_argument(
        "--model", help="such as JiT-B/16, or '{patch_size: 16, hidden_size: 768, …}' in the official names"
    )
    group.add_argument("--image-size", type=int, metavar="PIXELS", help="16 patches by default, as published")
    group.add_argument("--ema", metavar="WHICH", help="of a training's checkpoint: 1 (the default), 2 or none")


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        "score samples against real data, with all that decided the scores; or compare two such cards",
        "reparam eval samples/ --reference photos/ --out card.json; reparam eval --compare a.json b.json",
        _eval,
    )
    parser.add_argument(
        "samples",
        nargs="?",
        help="a run, a folder, .zip, .tar or .parquet file of pictures, or a .npz or .npy file",
    )
    parser.add_argument(
        "--reference",
        metavar="DATA",
        help="real data, as a recipe's data: a path, a name, or a YAML mapping; or statistics kept before "
        "(.safetensors). Of a run, its own data by default",
    )
    parser.add_argument("--metrics", metavar="A,B", help="which; all that apply by default")
    parser.add_argument(
        "--extractor",
        help="of pictures: efficientnet_lite0 (the default), '{name: inception, path: FILE}', dinov2, pixels, "
        "pkg.mod:make",
    )
    parser.add_argument(
        "--range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="of float pictures: what black and white are"
    )
    parser.add_argument("--count", type=int, metavar="N", help="at most so many reference data; all by default")
    parser.add_argument("--out", metavar="FILE", help="write the card to this .json file")
    parser.add_argument("--cache", metavar="DIR", help="keep statistics of references there")
    parser.add_argument(
        "--keep-reference", metavar="FILE", help="write the reference's statistics to this .safetensors file"
    )
    parser.add_argument("--device", help="cpu, cuda or mps; the best there is by default")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two cards, or runs: do they differ beyond noise?"
    )
    _add_spec(parser)


def _add_check(commands: Any) -> None:
    parser = _command(
        commands,
        "check",
        "probe a target: does its inverse agree, where is it singular, what does its loss learn",
        "reparam check mine.py; reparam check 'p=-sigma,q=alpha' --schedule cosine",
        _check,
    )
    parser.add_argument(
        "target",
        help="a name, a row p=…,q=…, a YAML mapping as a recipe has it, or a .py file with the two functions of a task",
    )
    parser.add_argument(
        "--schedule",
        default="ddpm",
        help="the forward process, a name or a YAML mapping; ddpm's linear table by default",
    )
    parser.add_argument(
        "--t-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the times it is used at; all by default"
    )
    parser.add_argument("--plot", metavar="FILE", help="write the inverse error over t as an .svg file")


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        "state a model as another target: exactly the same function, and nothing is trained",
        "reparam convert runs/mine --to v --out mine-v.safetensors",
        _convert,
    )
    parser.add_argument("model", help="the folder of a run, or a .safetensors file")
    parser.add_argument("--to", metavar="TARGET", help="the new target: v, eps, '{name: k, k: 0.3}' …")
    parser.add_argument(
        "--out", required=True, metavar="PLACE", help="a .safetensors file or a folder to write; of diffusers a folder"
    )
    parser.add_argument(
        "--format", default="reparam", help="reparam (the default), or diffusers, for the networks that it has"
    )
    parser.add_argument(
        "--t-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the times it is for; the model's by default"
    )
    _add_spec(parser)


def _add_identify(commands: Any) -> None:
    parser = _command(
        commands,
        "identify",
        "find out what a network predicts, by holding every reading of it against real data",
        "reparam identify model.safetensors --data photos/; reparam identify mine.model:make --data held-out.npy",
        _identify,
    )
    parser.add_argument(
        "model", help="the folder of a run, a .safetensors file, pkg.mod:make, or a folder that diffusers wrote"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="real data, as a recipe's data: a path, a name, or a YAML mapping; best such as the network never saw. "
        "Of a run, its own held-out data by default",
    )
    parser.add_argument(
        "--network", help="of weights without a spec: a built-in network as a YAML mapping, or pkg.mod:make"
    )
    parser.add_argument("--schedule", help="the forward process, where it is known; all in use are tried by default")
    parser.add_argument("--labels", action="store_true", help="give the network the labels of the data as y")
    parser.add_argument("--ignore-spec", action="store_true", help="pay no heed to what the weights say of themselves")
    parser.add_argument("--n", type=int, help="how many samples; 512 by default, fewer of large ones")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")


def _add_basis(commands: Any) -> None:
    parser = _command(
        commands,
        "basis",
        "compute principal directions of data, for targets that differ inside and outside of them",
        "reparam basis photos/ --patch 16 --rank 8 --out basis.safetensors",
        _basis,
    )
    parser.add_argument("data", help="as a recipe's data: a path, a name, or a YAML mapping")
    parser.add_argument("--rank", type=int, required=True, help="how many directions")
    parser.add_argument("--patch", type=int, help="of patches of so many pixels; of whole samples by default")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file to write")


def _add_report(commands: Any) -> None:
    parser = _command(
        commands, "report", "write the page of a finished study anew", "reparam report runs/spiral", _report
    )
    parser.add_argument("study", help="the folder of a study")


def _add_show(commands: Any) -> None:
    parser = _command(
        commands,
        "show",
        "say in words what a model is: what it predicts, under which process, how it was trained",
        "reparam show runs/spiral/dim2-x0",
        _show,
    )
    parser.add_argument("model", help="the folder of a run, or a .safetensors file")
    _add_spec(parser)


def _add_spec(parser: Any) -> None:
    parser.add_argument(
        "--spec",
        metavar="SPEC",
        help="what the weights do not say of themselves, or say wrongly: '{target: v}', or a .json or .yaml file",
    )


def _spec(text: str | None) -> Any:
    """What ``--spec`` says: a file, or a mapping, whose target may be a Python file by name, which is run."""
    found = _named_or_mapping(text, "--spec")
    target = found.get("target") if isinstance(found, dict) else None
    if isinstance(target, dict) and target.get("name") == "file":
        from .confidence import prediction

        _say_aside(f"running your code: target {target.get('path')}")
        found["target"] = prediction(target)
    return found


def _say(text: str) -> None:
    print(text, flush=True)


def _basis(args: Any) -> int:
    from .data import load_data
    from .studies.recipe import data_named, parse_yaml
    from .targets import principal

    config = parse_yaml(args.data, "data") if args.data.lstrip().startswith("{") else data_named(args.data)
    data = load_data(config)
    _say_aside(f"  {data.preflight()}")
    basis = principal(data.chunks(1024), args.rank, args.patch)
    basis.save(args.out)
    _finish(
        args, {"out": args.out, "shape": list(basis.columns.shape), "digest": basis.digest}, f"{basis!r}: {args.out}"
    )
    return 0


def _named_or_mapping(text: str | None, where: str) -> Any:
    """A name, or the YAML mapping that text in braces is."""
    from .studies.recipe import parse_yaml

    return parse_yaml(text, where) if text is not None and text.lstrip().startswith("{") else text


def _mapping(text: str, where: str) -> dict[str, Any]:
    from .studies.recipe import parse_yaml

    found = parse_yaml(text, where)
    if not isinstance(found, dict):
        raise ReparamError(f"{where}: expected a mapping such as '{{num_cpus: 8}}', found {text!r}.")
    return found


def _say_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _finish(args: Any, result: dict[str, Any], text: str) -> None:
    print(json.dumps(result) if args.json else text, file=args.result)


#: Options of a study that say nothing without a recipe, and what they are where they are not given.
_OF_A_STUDY: dict[str, Any] = {"set": [], "target": [], "on": "local"}
_OF_A_STUDY |= dict.fromkeys(("out", "jobs", "device", "per_run"))
_OF_A_STUDY |= dict.fromkeys(("tiny", "skip_bad", "estimate"), False)


def _study(args: Any) -> int:
    if args.recipe is None:
        given = [name for name, default in _OF_A_STUDY.items() if getattr(args, name) != default]
        if given:
            raise ReparamError(
                f"which recipe? --{given[0].replace('_', '-')} is of one: reparam study RECIPE …; reparam study alone "
                "lists those that are built in."
            )
        return _list_recipes(args)
    from dataclasses import asdict

    from .studies import study

    done = study(
        args.recipe,
        out=args.out,
        settings=[*args.set, *(["data.skip_bad=true"] if args.skip_bad else [])],
        tiny=args.tiny,
        targets=args.target,
        jobs=args.jobs,
        device=args.device,
        on=args.on,
        per_run=None if args.per_run is None else _mapping(args.per_run, "--per-run"),
        estimate_only=args.estimate,
        say=_say,
    )
    if done is None:
        if args.json:
            _finish(args, {"estimate_only": True}, "")
        return 0
    failed = "".join(f"\nfailed: {run}: {message}" for run, message in done.failed.items())
    _finish(
        args,
        {
            "out": str(done.out),
            "report": str(done.report),
            "leaderboard": done.rows,
            "published": [asdict(row) for row in done.recipe.published],
            "failed": done.failed,
        },
        f"\n{done.table()}\n\nleaderboard: {done.out / 'leaderboard.json'}\nreport:      {done.report}{failed}",
    )
    return 2 if done.failed else 0


def _train(args: Any) -> int:
    from dataclasses import asdict

    from .studies.estimate import Cost
    from .studies.train import train

    done = train(
        args.recipe,
        add_confidence=args.add_confidence,
        init=args.init,
        out=args.out,
        run=args.run,
        settings=[
            *([] if args.target is None else [f"target={args.target}"]),
            *args.set,
            *(["data.skip_bad=true"] if args.skip_bad else []),
        ],
        tiny=args.tiny,
        device=args.device,
        save_every=60 * args.save_every,
        keep=args.keep,
        tracker=args.tracker,
        previews=args.previews,
        estimate_only=args.estimate,
        say=_say,
    )
    if done is None:  # not the first of several processes
        return 0
    if isinstance(done, Cost):
        if args.json:
            _finish(args, {"estimate_only": True, **asdict(done)}, "")
        return 0
    _finish(args, {"out": str(done.out), **done.row}, f"\n{done.text()}")
    return 0 if done.row["status"] == "finished" else 1


def _average(args: Any) -> int:
    from .studies.averaging import average_run

    path, made = average_run(args.run, args.width, step=args.step, out=args.out, allow_inexact=args.allow_inexact)
    result = {"out": str(path), "step": made.step, "width": made.sigma_rel, "residual": made.residual}
    said = f"width {made.sigma_rel:g} at step {made.step}, of {len(made.coefficients)} snapshots"
    _finish(args, result, f"{said} (off by {made.residual:.2g} of the profile): {path}")
    return 0


def _prepare(args: Any) -> int:
    from .tools.prepare import prepare

    options = ("size", "vae", "dtype", "workers", "skip_bad", "labels", "column", "hub", "shard", "batch", "device")
    done = prepare(args.data, args.out, **{name: getattr(args, name) for name in options})
    _finish(args, done.to_dict(), done.text())
    return 0


def _list_recipes(args: Any) -> int:
    from .studies.recipe import built_in, read_recipe

    found = {name: str(read_recipe(name).get("description", "")) for name in built_in()}
    widest = max(map(len, found))
    lines = [f"  {name:<{widest}}  {text}" for name, text in found.items()]
    _finish(args, {"recipes": found}, "built-in recipes (reparam study NAME):\n" + "\n".join(lines))
    return 0


def _sample(args: Any) -> int:
    from .studies.sampling import sample_run

    done = sample_run(
        _sampled_from(args),
        args.n,
        out=args.out,
        sampler=_named_or_mapping(args.sampler, "--sampler"),
        steps=args.steps,
        grid=_named_or_mapping(args.grid, "--grid"),
        threshold=args.threshold,
        seed=args.seed,
        label=args.label,
        guidance=args.guidance,
        interval=args.interval and tuple(args.interval),
        batch=args.batch,
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        spec=_spec(args.spec),
        say=_say_aside,
    )
    if done is None:  # not the first of several processes
        return 0
    path, shape = done
    _finish(
        args,
        {"out": str(path), "shape": list(shape)},
        f"{shape[0]} samples of shape {list(shape[1:])}: {path}",
    )
    return 0


def _sampled_from(args: Any) -> Any:
    """The run that is named, or the official weights that are described."""
    from .errors import Conflict
    from .studies.sampling import Official

    if args.official is None:
        only = [name for name in ("model", "image_size", "ema") if getattr(args, name) is not None]
        if only:
            raise Conflict(f"--{only[0].replace('_', '-')} is of official weights; name their file: --official FILE.")
        if args.run is None:
            args.refuse("which model? reparam sample RUN, or --official FILE --model JiT-B/16.")
        return args.run
    if args.run is not None:
        raise Conflict(f"both a run ({args.run}) and --official {args.official} are given; leave one of them out.")
    if args.model is None:
        args.refuse("--official needs to know which model the weights are of: --model JiT-B/16.")
    return Official(args.official, _named_or_mapping(args.model, "--model"), args.image_size, args.ema)


def _eval(args: Any) -> int:
    from .errors import Conflict

    if args.compare:
        others = ["samples", "reference", "metrics", "extractor", "range", "count", "out", "cache", "keep_reference"]
        others += ["spec"]
        if given := [name for name in others if getattr(args, name) is not None]:
            raise Conflict(f"--compare takes two cards and nothing else; found {', '.join(given)} beside it.")
        return _compare(args)
    if args.samples is None:
        raise ReparamError("which samples? reparam eval SAMPLES --reference DATA, or --compare A.json B.json.")
    from .studies.evaluate import evaluate

    if args.extractor and ":" in args.extractor and not args.extractor.lstrip().startswith("{"):
        _say_aside(f"running your code: extractor {args.extractor}")
    done = evaluate(
        args.samples,
        _named_or_mapping(args.reference, "--reference"),
        args.metrics.split(",") if args.metrics else None,
        extractor=_named_or_mapping(args.extractor, "--extractor"),
        value_range=args.range and tuple(args.range),
        count=args.count,
        cache=args.cache,
        device=args.device,
        out=args.out,
        keep_reference=args.keep_reference,
        spec=_spec(args.spec),
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _finish(
            args, {**done.card, "left_out": done.left_out}, done.text() + (f"\n\ncard: {args.out}" if args.out else "")
        )
    return 0


def _compare(args: Any) -> int:
    from .metrics.card import compare, read_card, told

    found = compare(*(read_card(path) for path in args.compare))
    _finish(args, {"compared": list(args.compare), "metrics": found}, told(found))
    return 0


def _check(args: Any) -> int:
    from pathlib import Path

    from .studies.recipe import parse_yaml
    from .tools import check
    from .tools.check import plot

    if args.target.endswith(".py"):
        _say_aside(f"running your code: target {args.target}")
    found = check(
        _named_or_mapping(args.target, "target"), parse_yaml(args.schedule, "--schedule"), t_range=args.t_range
    )
    if args.plot:
        plot(found, Path(args.plot))
    _finish(args, found.to_dict(), found.text() + (f"\n\nplot: {args.plot}" if args.plot else ""))
    return 0 if found.verdict == "consistent" else 1


def _convert(args: Any) -> int:
    from .tools.convert import convert_model

    t_range = None if args.t_range is None else (args.t_range[0], args.t_range[1])
    to = _named_or_mapping(args.to, "--to")
    done = convert_model(args.model, to, args.out, form=args.format, t_range=t_range, spec=_spec(args.spec))
    _finish(args, done.to_dict(), done.text())
    return 0


def _bar(form: str) -> Any:
    """A progress bar on standard error, where that is a terminal; it leaves no trace, and begins late."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    return tqdm(total=0, file=sys.stderr, bar_format=form, delay=1, leave=False, dynamic_ncols=True, disable=hidden)


def _advance(bar: Any, done: int, expected: int) -> None:
    bar.total = expected
    bar.update(done - bar.n)


def _identify(args: Any) -> int:
    from .networks import is_factory
    from .tools import identify

    for what in (args.model, args.network):
        if is_factory(what) and not what.lstrip().startswith("{") and not os.path.exists(what):
            _say_aside(f"running your code: network {what}")
    with _bar("{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} samples asked, {remaining} left") as bar:
        found = identify(
            args.model,
            _named_or_mapping(args.data, "--data"),
            network=_named_or_mapping(args.network, "--network"),
            schedule_=_named_or_mapping(args.schedule, "--schedule"),
            labels=args.labels,
            use_spec=not args.ignore_spec,
            n=args.n,
            seed=args.seed,
            progress=functools.partial(_advance, bar),
        )
    _finish(args, found.to_dict(), found.text())
    return 1 if found.verdict == "undecided" else 0


def _report(args: Any) -> int:
    from .studies import open_study

    done = open_study(args.study)
    _finish(args, {"report": str(done.report)}, f"{done.table()}\n\nreport: {done.report}")
    return 0


def _show(args: Any) -> int:
    from .spec import read_spec, weights_file

    spec = read_spec(weights_file(args.model), _spec(args.spec))
    lines = [f"{what:<20} {how}" for what, how in spec.in_words()]
    _finish(args, spec.to_dict(), "\n".join(lines))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 fine, 1 a negative check, 2 a user's error, 130 interrupted."""
    args = _parser().parse_args(argv)
    args.result = sys.stdout
    # With --json, standard output belongs to the one object; all else, a network's prints too, goes aside.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    try:
        with aside:
            return int(args.call(args))
    except ReparamError as e:
        if args.debug:
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"\n{e}" if str(e) else "\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
