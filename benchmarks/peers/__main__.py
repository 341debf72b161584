"""redraft and other engines on the same weights, prompts, threads and sampling, into benchmarks/results/peers.*.

    python -m benchmarks.peers --only redraft,llama.cpp --streams 1 --temperatures 0

The first time it installs the engines (most of it the build of llama.cpp), then it measures for hours. What is done is
kept, so it may be stopped and started again. `--quick` tries everything out in minutes.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.cells import Cells
from benchmarks.peers.bench import Bench
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.checkpoints import Checkpoints
from benchmarks.peers.environments import FOLDER
from benchmarks.peers.launch import Launcher
from benchmarks.peers.page import write
from benchmarks.prompts import DataOption, has_data
from benchmarks.report import RESULTS
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import load_tokenizer

ENGINES = ",".join([peer.name for peer in PEERS])
DOMAINS = "sql,support,extract,math,code,spec_bench"
K = 4


def main(
    only: Annotated[str, typer.Option(help="Engines, comma-separated.")] = ENGINES,
    streams: Annotated[str, typer.Option(help="Requests at once; several are of all domains mixed.")] = "1,8,16",
    domains: Annotated[str, typer.Option(help="For one stream.")] = DOMAINS,
    temperatures: Annotated[str, typer.Option(help="0 is greedy; others come with top-p 0.95.")] = "0,0.7",
    prompts: Annotated[int, typer.Option(min=1, help="Per domain.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2, help="At most, per prompt.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each prompt.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Of every engine.")] = len(os.sched_getaffinity(0)),
    target: Annotated[str, typer.Option(help="The target, for all engines.")] = "demo",
    draft: Annotated[str, typer.Option(help="The draft, for all engines.")] = "demo-draft",
    again: Annotated[bool, typer.Option("--again", help="Measure known cells anew.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help=f"One short prompt, into {FOLDER}: only a try-out.")] = False,
    data: DataOption = None,
) -> None:
    """Measure what is not known yet; write the page."""
    console = Console(stderr=True)
    names = only.split(",")
    if unknown := set(names) - {peer.name for peer in PEERS}:
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint="--only")
    if quick:
        streams, temperatures, domains, prompts, new_tokens, repeats = "1", "0", "sql", 1, 16, 1
    cells = Cells((FOLDER / "quick" if quick else RESULTS) / "peers.json", again=again or quick)
    bench = Bench(
        launcher=Launcher(Checkpoints(target, draft), threads, K),
        cells=cells,
        tokenizer=load_tokenizer(ModelRef.parse(target)),
        data=data,
        peers=[peer for peer in PEERS if peer.name in names],
        domains=domains.split(",") if has_data(data) else ("built-in",),
        temperatures=[float(word) for word in temperatures.split(",")],
        num_prompts=prompts,
        max_new_tokens=new_tokens,
        repeats=repeats,
        console=console,
    )
    counts = [int(word) for word in streams.split(",")]
    remaining = [bench.remaining(count) for count in counts]
    num_cells, seconds = sum(cells for cells, _ in remaining), sum(seconds for _, seconds in remaining)
    console.print(f"{num_cells} cells to measure, about {seconds / 60:.0f} minutes on two cores, without setting up")
    for count in counts:
        bench.run(count)
    page = write(cells, bench.unavailable, threads, K)
    typer.echo(page.read_text(encoding="utf-8"))
    if bench.unavailable:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
