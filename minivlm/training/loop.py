"""The training loop: rows in an order that follows from the seed, steps, a log, and a state to resume from.

    for step in finetune(model, processor, rows, Recipe(lr=1e-4), out="runs/first"):
        print(step.number, step.loss)

Which rows a step takes is arithmetic on its number (`order`). The state holds everything else
(parameters, the optimiser's means, random numbers): losses after a kill are bit for bit those of a run without one.
Under `torchrun` each process takes its share of every step, and gradients are added up before they are divided.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minivlm.checkpoint.files import saving
from minivlm.devices.memory import peak
from minivlm.training import data, folder, memory
from minivlm.training.folder import STATE
from minivlm.training.loss import token_loss
from minivlm.training.optimisation import Make, Optimisation, adamw, scheduled, trained
from minivlm.training.order import Order, pieces
from minivlm.training.recipe import Recipe, Step
from minivlm.training.rows import Row, fingerprint

PARTS = "state-"  # folders with the state of a model that is cut among processes
Loss = Callable[[Any, Any], tuple[Tensor, int]]  # of a model and a batch: see `token_loss`


def finetune(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    eval_rows: list[Row] | None = None,
    resume: bool = False,
    collate: Callable[[list[Row]], Any] | None = None,
    loss: Loss = token_loss,
    optimisers: Make | None = None,
) -> Iterator[Step]:
    """Train what requires gradients in a model: an adapter that `lora.apply` has put on, or all of it.

    out: a folder for the state, log.jsonl and the result (an adapter in PEFT's form, or the whole checkpoint), written
    every `save_every` steps and at the end. resume: go on from its state; the same call otherwise.
    For another task: collate makes a batch of rows, in place of `data.encode`; loss takes (model, batch) and returns a
    sum and how many terms it has, and if it is a module its own parameters are trained too (they are in the state
    only); optimisers makes others than the recipe's AdamW.
    Raises ValueError for a state from other rows or settings, for float16, and at the first loss that is not finite.
    """
    out = None if out is None else Path(out)
    run = _Run(model, data.for_training(processor), rows, recipe, out, collate, loss, optimisers)
    run.begin(resume)
    model.train()
    for number, batches in run.order.batches(run.first, run.collate):
        step = run.step(number, batches)
        last = number + 1 == run.order.steps
        if eval_rows and (last or (recipe.eval_every and step.number % recipe.eval_every == 0)):
            step = dataclasses.replace(step, eval_loss=evaluate(model, processor, eval_rows, recipe.batch))
        run.log(step)
        if last or (recipe.save_every and step.number % recipe.save_every == 0):
            run.save(step.number, processor)
        yield step
    model.eval()


@torch.no_grad()
def evaluate(model: Any, processor: Any, rows: list[Row], batch: int = 2) -> float:
    """The mean loss of a learned token of these rows, each process taking its share."""
    rank, world = _rank()
    processor, was, sums = data.for_training(processor), model.training, torch.zeros(2, dtype=torch.float64)
    model.eval()
    loss, own = _loss_of(model, token_loss), pieces(rows[rank::world], batch)
    for number in range(len(pieces(rows[::world], batch)) if _is_cut(model) else len(own)):
        taken = own[number] if number < len(own) else rows[:1]  # as many passes in every process
        total, learned = loss(model, data.encode(processor, taken).to(model.device))
        sums += torch.tensor([total.item(), learned], dtype=torch.float64) * (number < len(own))
    model.train(was)
    if world > 1:
        sums = sums.to(model.device)
        dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).item()


def _loss_of(model: Any, loss: Loss) -> Loss:
    """A model that is cut among processes gathers its weights around a method of its own."""
    if not _is_cut(model):
        return loss
    if loss is not token_loss:
        raise ValueError("a model that is cut among processes is trained by the loss of its tokens alone")
    return lambda model, inputs: model.summed_loss(inputs)


def _kind(model: Any, processor: Any) -> dict[str, Any]:
    """What losses depend on besides rows and recipe: the adapter's settings, the weights' format, the inputs."""
    adapter = getattr(model, "adapter_config", None)
    settings = {} if adapter is None else dataclasses.asdict(adapter)
    images, quantised = getattr(processor, "image_processor", None), getattr(model, "quantization_config", None)
    inputs = [images.to_dict() if hasattr(images, "to_dict") else None, getattr(processor, "chat_template", None)]
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    return {
        **{f"the adapter's {name}": value for name, value in settings.items()},
        "weights": str(model.dtype).removeprefix("torch.") + (f", {quantised.format}" if quantised else ""),
        "image settings and chat template": digest[:16],
    }


def _is_cut(model: Any) -> bool:
    """Whether `fsdp.shard` has cut it among all processes."""
    return hasattr(model, "summed_loss")


def _rank() -> tuple[int, int]:
    """(this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Run:
    """One training run: its order of rows, its optimiser, its files."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: Sequence[Row],
        recipe: Recipe,
        out: Path | None,
        collate: Callable[[list[Row]], Any] | None = None,
        loss: Loss = token_loss,
        optimisers: Make | None = None,
    ) -> None:
        self.model, self.rows, self.recipe, self.out = model, rows, recipe, out
        self.loss = _loss_of(model, loss)
        self.kind = _kind(model, processor)
        self.cut = _is_cut(model)
        if model.dtype == torch.float16:
            raise ValueError("float16 loses small gradients; load the model in bfloat16 or float32 to train it")
        self.collate = collate or partial(data.encode, processor)
        self.rank, self.world = _rank()
        self.order = Order(rows, recipe, self.rank, self.world, even=self.cut)
        share = recipe.warmup < 1
        self.warmup = math.ceil(recipe.warmup * self.order.steps) if share else int(recipe.warmup)
        parameters = trained(model)
        if isinstance(loss, nn.Module):
            parameters |= {f"loss.{name}": parameter for name, parameter in loss.named_parameters()}
        make = optimisers or adamw(model, recipe.lr, recipe.decay, recipe.optimizer)
        self.optimisation = Optimisation(parameters, make, recipe.clip)
        self.first = 0
        memory.lean_gates(model)
        memory.freeze_tower(model, recipe.cache_bytes)
        if recipe.checkpointing:
            memory.checkpoint_layers(model)

    # ---- Steps

    def step(self, number: int, batches: Iterator[tuple[list[int], Any]]) -> Step:
        begun = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64)  # loss, learned tokens, all tokens
        own = self.order.own(number)
        for count, (indices, inputs) in enumerate(batches):
            inputs = inputs.to(self.model.device)
            total, learned = self.loss(self.model, inputs)
            tokens = inputs["input_ids"].numel() if "input_ids" in inputs else learned
            if count >= own:  # a pass that only keeps step with the other processes
                total, learned, tokens = total * 0, 0, 0
            sums += torch.tensor([total.item(), learned, tokens], dtype=torch.float64)
            if not math.isfinite(total.item()):
                raise ValueError(f"step {number + 1}: the loss is {total.item()} for {self._named(indices)}; {HINT}")
            if learned or self.cut:
                total.backward()
        factor = scheduled(self.recipe.schedule, number, self.order.steps, self.warmup)
        norm, sums = self.optimisation.step(factor, sums)
        if not math.isfinite(norm):
            rows = self._named([index for some in self.order.indices(number) for index in some])
            raise ValueError(f"step {number + 1}: the gradient's norm is {norm} for {rows}; {HINT}")
        seconds = time.perf_counter() - begun
        loss, learned, tokens = sums.tolist()
        return Step(
            number=number + 1,
            epoch=round((number + 1) / self.order.per_epoch, 4),
            loss=loss / max(1.0, learned),
            tokens=int(tokens),
            learned=int(learned),
            lr=self.recipe.lr * factor,
            norm=norm,
            seconds=round(seconds, 4),
            tokens_per_second=round(tokens / seconds, 1),
            memory=peak(self.model.device) or 0,
        )

    def _named(self, indices: list[int]) -> str:
        return ", ".join(self.rows[index].where for index in indices)

    # ---- Files

    def begin(self, resume: bool) -> None:
        """Seed, or continue from the state. ValueError if the folder already holds a run, or another's state."""
        torch.manual_seed(self.recipe.seed + self.rank)
        if self.out is None:
            return
        folder.check(self.out, resume)
        folder.prepare(self.out, first=self.rank == 0)
        if (self.out / STATE).exists():
            self._restore(torch.load(self.out / STATE, weights_only=True, map_location="cpu"))
        if self.rank == 0:
            folder.cut_log(self.out, self.first)

    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in self._about().items():
            if state["about"].get(name, value if name in self.kind else None) != value:  # older states lack the kind
                raise ValueError(
                    f"{self.out / STATE} was saved with {name} {state['about'].get(name)!r:.80}, not {value!r:.80}; "
                    "go on as it was begun, or name another folder"
                )
        self.first = state["step"]
        if self.cut:
            from minivlm.training import fsdp

            fsdp.load_state(self.model, self.optimisation.optimisers, self.out / state["parts"])
        else:
            self.optimisation.restore(state["optimisation"])
        if len(state["random"]) != self.world:  # another number of processes: dropout draws other numbers
            return
        cpu, cuda = state["random"][self.rank]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    def _about(self) -> dict[str, Any]:
        """What a resumed run must share with the one before."""
        free = ("workers", "eval_every", "save_every")  # these change no loss
        recipe = {name: value for name, value in dataclasses.asdict(self.recipe).items() if name not in free}
        about = {"rows": fingerprint(self.rows), **self.kind, **recipe}
        return about | ({"batch": None, "accumulate": self.order.per_step} if self.cut else {"processes": self.world})

    def log(self, step: Step) -> None:
        if self.out is not None and self.rank == 0:
            folder.log(self.out, step)

    def save(self, step: int, processor: Any) -> None:
        """The state, and what the run has made so far."""
        if self.out is None:
            return
        cuda = torch.cuda.get_rng_state() if self.model.device.type == "cuda" else None
        random = [(torch.get_rng_state(), cuda)] * self.world
        if self.world > 1:
            dist.all_gather_object(random, random[0])
        state = {"step": step, "about": self._about(), "random": random}
        weights = None
        if self.cut:
            from minivlm.training import fsdp

            weights, state["parts"] = fsdp.save_parts(self.model, self.optimisation.optimisers, self.out, step)
        else:
            state["optimisation"] = self.optimisation.state()
        if self.rank == 0:
            with saving() as written:
                folder.save_result(self.model, self.out, processor, weights)
                torch.save(state, written.file(self.out / STATE))
            for older in self.out.glob(f"{PARTS}*"):
                if older.name != state.get("parts"):
                    shutil.rmtree(older, ignore_errors=True)


HINT = "nothing was saved of this step. Try a lower learning rate, or float32 in place of bfloat16"
