"""Examples at the end of each command's help; a test parses every one."""

EXAMPLES = {
    "calibrate": (
        "--model MODEL --dataset play.txt code.txt --budget auto --max-loss 1% --target-rows 10%",
        "--model MODEL --dataset play.txt --k 64 128 256 --output table.yaml --resume",
        "--model MODEL --dataset play.txt code.txt --output table.yaml --k-screen-only",
    ),
    "inspect": ("table.yaml", "table.yaml --json", "table.yaml --plot table.png"),
    "evaluate": (
        "--model MODEL --dataset play.txt code.txt --rows 0.05 0.1 --json out.json --plot out.png",
        "--model MODEL --dataset play.txt --rules toptheta --rows --budget 128 --lengths 2048 8192",
        "--model MODEL --dataset play.txt --rules toptheta topk sift-context --rows 0.1 --needles 4096",
        "--model MODEL --dataset play.txt --rules toptheta --rows --budget 128 --tasks multikey questions",
        "--model MODEL --dataset play.txt --rules toptheta --rows --budget 128 --k-screen off int4 int4+4",
    ),
    "report": ("table.yaml --evaluation out.json --bench decode.json serve.json -o report.html",),
    "verify": ("--model MODEL", "--model MODEL --thresholds table.yaml --json"),
    "bench": (
        "decode --batch 1 8 --seq-lens 2048 8192 --keep 1.0 0.1 --json decode.json",
        "capture --model MODEL --dataset play.txt --seq-len 8192 --output cache.safetensors",
        "decode --cache cache.safetensors --budget 64 128 --k-screen off int4+4",
        "decode --ragged 1x32768+7x2048 --keep 1.0 0.1",
        "engine --shape smollm2-135m --batch 4 --context 2048 --keep 1.0 0.1",
        "serve --model MODEL --dataset play.txt --toptheta '{\"budget\": 128}' --json serve.json",
    ),
}


def epilog(command: str) -> str:
    """The text behind a command's options."""
    return "\n".join(["examples:", *(f"  topt-vllm {command} {example}" for example in EXAMPLES[command])])
