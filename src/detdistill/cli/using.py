"""Verbs for trained detectors, and lists of what there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from detdistill.cli.app import Device, Weights, app


class Metric(str, Enum):
    """Ways to measure detections."""

    coco = "coco"
    voc = "voc"


class Style(str, Enum):
    """Whose ResNet: where the strides of its bottlenecks are, and what its input is."""

    pytorch = "pytorch"
    caffe = "caffe"


@app.command()
def evaluate(
    weights: Weights,
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_RECIPE", help="Dataset folder or recipe. Default: the run's own."),
    ] = None,
    split: Annotated[str, typer.Option(help="Dataset split.")] = "val",
    metric: Annotated[Metric, typer.Option(help="COCO's 12 metrics, or VOC AP at IoU 0.5.")] = Metric.coco,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=65536)] = 8,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Data loading processes.")] = 2,
    device: Device = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this JSON file.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write detections to this file in COCO's results format.")
    ] = None,
) -> None:
    """Evaluate a model on a dataset."""
    from detdistill.cli.printing import print_evaluation, progress_bar, write_json
    from detdistill.errors import UserError
    from detdistill.evaluation.coco import coco_results
    from detdistill.evaluation.detector import DetectionEvaluation
    from detdistill.evaluation.evaluate import as_detector, as_model
    from detdistill.evaluation.evaluate import evaluate as evaluate_model
    from detdistill.output import output_json

    asked = [name for name, given in (("--metric voc", metric is Metric.voc), ("--results", results)) if given]
    if json_file is not None:
        output_json(json_file, "--json", dict)
    if results is not None:
        if json_file is not None and json_file.resolve() == results.resolve():
            raise UserError(f"{results}: is both --json and --results: give two files")
        output_json(results, "--results", list)
    model = as_detector(weights, asked[0]) if asked else as_model(weights)
    data = data or _data_of(weights)
    with progress_bar("evaluating") as progress:
        evaluation = evaluate_model(
            model, data, split=split, limit=limit, batch_size=batch_size, workers=workers, device=device,
            progress=progress,
        )  # fmt: skip
    if metric is Metric.voc:
        from detdistill.evaluation.voc import voc_ap

        assert isinstance(evaluation, DetectionEvaluation)
        voc = voc_ap(evaluation.split, evaluation.detections)
        numbers, per_class = {"mAP50": voc.mAP}, voc.per_class
    else:
        numbers, per_class = evaluation.numbers(), evaluation.per_class
    if json_file is not None:
        write_json(json_file, {**numbers, "per_class": per_class})
    if results is not None:
        assert isinstance(evaluation, DetectionEvaluation)
        write_json(results, coco_results(evaluation.split, evaluation.detections, evaluation.masks))
    print_evaluation(evaluation, numbers, per_class)  # last: what it is piped into may close first


def _data_of(weights: Path) -> str:
    """The recipe in a run folder, which names its data; also of a file in one."""
    from detdistill.errors import UserError

    for folder in (weights, weights.parent):
        if (folder / "recipe.yaml").is_file():
            return str(folder / "recipe.yaml")
    raise UserError(
        f"{weights}: is not of a run folder, which would know its data: give --data FOLDER_OR_RECIPE"
    )


@app.command()
def predict(
    weights: Weights,
    images: Annotated[Path, typer.Argument(metavar="IMAGE_OR_FOLDER")],
    out: Annotated[Path, typer.Option(help="Folder for pictures and predictions.json.")] = Path("runs/predict"),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Minimum score.")] = 0.3,
    batch_size: Annotated[int, typer.Option(min=1, max=65536, help="Batch size.")] = 1,
    teacher: Annotated[
        Path | None, typer.Option(help="Also draw this model's detections, on the right.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Run a model on images; write pictures and JSON."""
    from detdistill.cli.printing import progress_bar, say
    from detdistill.commands.predict import iter_predictions

    images_seen, found, pixels = 0, Counter[str](), Counter[str]()
    with progress_bar("detecting") as progress:
        for prediction in iter_predictions(
            weights, images, out=out, threshold=threshold, batch_size=batch_size, teacher=teacher,
            device=device, progress=progress,
        ):  # fmt: skip
            images_seen += 1
            found.update(prediction.names)
            pixels.update(prediction.shares)
    if pixels:
        listed = ", ".join(f"{share / images_seen:.0%} {name}" for name, share in pixels.most_common(10))
        say(f"{images_seen} images: {listed}")
    else:
        listed = ", ".join(f"{count} {name}" for name, count in found.most_common(10))
        say(f"{images_seen} images, {found.total()} objects" + (f": {listed}" if listed else ""))
    say(f"pictures and predictions.json: {out}")


@app.command()
def export(
    weights: Weights,
    out: Annotated[
        Path | None,
        typer.Option(help="Output file, .onnx or .pt2. Default: .onnx in the folder of the weights."),
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="H W", help="Input size. Default: the model's own.")
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Allow any batch size. Default: 1.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(metavar="IMAGES", help="Compare on these images. Default: synthetic digits and noise."),
    ] = None,
) -> None:
    """Export a model to ONNX and check it against PyTorch."""
    from detdistill.cli.printing import say
    from detdistill.deployment.export import export as export_model

    done = export_model(weights, out, size=size, dynamic_batch=dynamic_batch, check=check)
    facts = done.facts
    say(f"{done.path}: {done.bytes / 1e6:.2f} MB, {done.parameters / 1e6:.2f} M parameters")
    say(f"input: {'N' if dynamic_batch else 1} × 3 × {facts.size[0]} × {facts.size[1]}, RGB, 0 to 255")
    say(f"against PyTorch: {done.agreement}")


@app.command()
def quantize(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX file of `detdistill export`.")],
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES",
            help="Calibration images, as in deployment; up to 128 are used.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Output file. Default: FILE with .int8.onnx.")] = None,
) -> None:
    """Quantize an exported model to 8 bits."""
    from detdistill.cli.printing import say
    from detdistill.deployment.quantize import quantize as quantize_file

    done = quantize_file(file, images, out)
    say(f"{done.path}: {done.bytes / 1e6:.2f} MB, before {done.bytes_before / 1e6:.2f} MB")
    say(f"ranges of activations from {done.calibrated} images")
    say(f"against {file.name}: {done.likeness}")
    say("what it costs in AP or mIoU: detdistill evaluate, of both files")


@app.command("import-mmdet")
def import_mmdet(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="A .pth file of MMDetection 2.x or 3.x.")],
    out: Annotated[Path | None, typer.Option(help="Output file. Default: FILE.safetensors.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Config with all bases written out. Default: the one in FILE.")
    ] = None,
    style: Annotated[
        Style | None, typer.Option(help="For a FILE without config: the published settings of this backbone.")
    ] = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B,C", help="Class names, if FILE has none.")] = None,
) -> None:
    """Convert an MMDetection checkpoint."""
    from detdistill.cli.printing import say
    from detdistill.models.checkpoints.mmdet import import_mmdet as import_checkpoint

    names = classes.split(",") if classes is not None else None
    path, found = import_checkpoint(
        checkpoint, out, config=config, style=style.value if style else None, classes=names
    )
    model = found.model
    say(f"{model.family} over {model.backbone}, {len(found.classes)} classes, at {model.size}")
    for name in ("convention", "stride_in_1x1", "score_threshold", "nms_threshold", "max_detections"):
        say(f"  {name}: {getattr(model, name)}")
    say(f"  input: RGB, mean {_digits(found.mean)}, std {_digits(found.std)}" + " (from BGR)" * found.bgr)
    say(f"  settings: {found.settings}")
    say(f"weights: {path}")


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Describe this method: equation, options, presets.")
    ] = None,
) -> None:
    """List distillation methods, or describe one."""
    from detdistill.cli.printing import first_line, say, show
    from detdistill.recipe import methods as known

    if name is not None:
        options = known.options_class(name)
        say(options.page() + "\n")
        columns, rows = known.option_table(options)
        show(columns, rows, text_columns=len(columns))
        show(("option", "what it is"), known.descriptions(options), text_columns=2)
        say(
            "It needs labels."
            if options.needs_labels
            else "Images without labels can be used, too (data.unlabeled)."
        )
        return
    listed = [(name, first_line(options.page())) for name, options in known.methods().items()]
    show(("method", "what it is"), listed, text_columns=2)


@app.command()
def models(
    backbones: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="List timm backbones instead, as 'resnet*' or '*mobile*'."),
    ] = None,
) -> None:
    """List model families or backbones."""
    if backbones is not None:
        import timm

        print("\n".join(timm.list_models(backbones)))
        return
    from detdistill.cli.printing import first_line, say, show
    from detdistill.recipe.models import families

    rows = [(name, config.task, first_line(config.__doc__)) for name, config in families().items()]
    show(("family", "task", "what it is"), rows, text_columns=3)
    say("backbone: any timm model with feature maps; `detdistill models --backbones 'resnet*'` lists names")


def _digits(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
