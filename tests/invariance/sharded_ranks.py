"""Run by the deepspeed launcher on two ranks: what test_sharded.py compares, in one start of the processes.

usage: sharded_ranks.py FOLDER   Facts go to FOLDER/facts-RANK.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))

from runs import Run, Stopped, counted_once, meet
from setups import make_setup

import abmll.memory.plan
import abmll.run
from abmll.config import load_config
from abmll.distributed import Ranks, start_ranks, stop_ranks
from abmll.lockstep import Lockstep, in_step
from abmll.memory.episode import read_ledger, run_episode
from abmll.memory.storages import StorageCounter
from abmll.models.load import load_model
from abmll.models.sharding import gathered_bytes
from abmll.rescore import evaluate
from abmll.trainer import Trainer

# a last step without an episode for the second rank; three test tasks, the third without a partner; other batches
UNEQUAL = ("trainer.episodes=5", "tasks.builtin.test_tasks=3", "tasks.builtin.test_examples=7", "eval.batch_size=3")
ACTIVATION = (*UNEQUAL, "eval.every=2")
WEIGHT = (*UNEQUAL, "adapters.posterior=weight", "eval.samples=2", "trainer.tasks_per_step=3")
BESIDE = (*UNEQUAL, "trainer.parallel_episodes=2")
FIRST_ORDER = (*UNEQUAL, "method.meta_gradient=first_order", "method.outer_batch=query")
SHARDED = "model.sharding=full"


class Script:
    def __init__(self, folder: Path):
        self.folder, self.starts = folder, 0
        self.rank = int(os.environ["RANK"])
        self.facts: dict[str, object] = {}
        self.lockstep: Lockstep | None = None

    def next_port(self) -> None:
        meet(self.folder, self.starts)
        self.starts += 1

    def start(self) -> Ranks:
        self.next_port()
        return start_ranks()

    def train(self, name: str, *overrides: str, resume: bool = False) -> None:
        self.next_port()
        Run(self.folder / name).train(*overrides, resume=resume)
        if self.lockstep is not None:
            self.facts[name] = {"passes": self.lockstep.passes, "idle": self.lockstep.idle}
            self.lockstep = None

    def stop_and_resume(self, name: str, *overrides: str) -> None:
        """Sharded up to its third step, whole from there on."""
        outer_step = Trainer._outer_step

        def stopping(trainer: Trainer, step: int) -> torch.Tensor:
            if step == 2:
                raise Stopped
            return outer_step(trainer, step)

        Trainer._outer_step = stopping
        try:
            self.train(name, *overrides, SHARDED, "trainer.checkpoint_every=1")
        except Stopped:
            Trainer._outer_step, self.lockstep = outer_step, None
        self.train(name, *overrides, "trainer.checkpoint_every=1", resume=True)

    def score(self, name: str, run: str) -> None:
        """A finished run's scores again."""
        self.next_port()
        evaluate(str(self.folder / run), [], str(self.folder / f"{name}.json"))

    def keep(self, ranks: Ranks, config, learner) -> Ranks:
        """`in_step`, remembering how many passes there were."""
        ranks = in_step(ranks, config, learner)
        self.lockstep = getattr(ranks.before_exchange, "__self__", None)
        return ranks

    def load(self, name: str, model: str) -> None:
        """A folder's model, sharded: its logits, what this rank holds, and what a forward and a backward pass bring."""
        ranks = self.start()
        config = load_config(Run(self.folder / name).config, [f"model.name={model}", SHARDED]).model
        received = torch.zeros(2, dtype=torch.int64)
        with counted_gathers(received):
            model, _ = load_model(config, ranks.device)
            received.zero_()
            with torch.no_grad():
                logits = model(torch.arange(6)[None], use_cache=False).logits
            forward = received.sum().item()
            model.enable_input_require_grads()  # as adapters in all layers would need
            received.zero_()
            model(torch.arange(6)[None], use_cache=False).logits.sum().backward()
        self.facts[name] = {
            "bytes": sum(
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
                for tensor in (*model.parameters(), *model.buffers())
            ),
            "received": [forward, received.sum().item()],
            "expected": gathered_bytes(model),
        }
        torch.save(logits, self.folder / f"{name}-{self.rank}.logits")
        stop_ranks()

    def refused(self, name: str, *overrides: str) -> None:
        """The message on this rank."""
        run, ranks = Run(self.folder / name), self.start()
        try:
            abmll.run.open_session(load_config(run.config, overrides), str(run.config), ranks, False, False)
            self.facts[name] = "not refused"
        except ValueError as error:
            self.facts[name] = str(error)
        stop_ranks()

    def memory(self) -> None:
        """Ledgers of real episodes on real ranks."""
        ranks, found = self.start(), {}
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        gc.disable()
        for policy in ("none", "all layers"):
            counter = StorageCounter()
            with counter.counting():
                run_episode(make_setup(policy, ranks=2, model={"sharding": "full"}, scoring=(3,)), counter, mesh)
            found[policy] = asdict(read_ledger(counter, 3))
        gc.enable()
        self.facts["memory"] = found
        stop_ranks()


def counted_gathers(received: torch.Tensor):
    """Bytes that come in through the process group, by profiling its calls."""
    import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives

    original = collectives.DefaultAllGather.__call__

    class Counting:
        def __enter__(self):
            def call(comm, output_tensor, input_tensor, *rest, **keywords):
                received[0] += output_tensor.nbytes - input_tensor.nbytes
                return original(comm, output_tensor, input_tensor, *rest, **keywords)

            collectives.DefaultAllGather.__call__ = call

        def __exit__(self, *_):
            collectives.DefaultAllGather.__call__ = original

    return Counting()


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    folder = Path(arguments[0])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    abmll.memory.plan.count_episode = counted_once(abmll.memory.plan.count_episode)
    script = Script(folder)
    abmll.run.in_step = script.keep
    kinds = {"activation": ACTIVATION, "weight": WEIGHT, "first order": FIRST_ORDER, "side by side": BESIDE}
    for name, overrides in kinds.items():
        script.train(f"{name} replicated", *overrides)
        script.train(f"{name} sharded", *overrides, SHARDED)
        script.train(f"{name} recomputed", *overrides, SHARDED, "trainer.activation_checkpointing=true")
    script.stop_and_resume("resumed", *ACTIVATION)
    script.score("scored", "activation sharded")
    for name in ("tied", "untied"):
        script.load(name, str(folder / f"model-{name}"))
    script.refused("no model", SHARDED, f"model.name={folder / 'model-broken'}")
    script.memory()
    (folder / f"facts-{script.rank}.json").write_text(json.dumps(script.facts))


if __name__ == "__main__":
    main()
