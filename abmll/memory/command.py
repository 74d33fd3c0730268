"""The command `launch/plan.py`: a run's plan beside plain LoRA's and on several ranks, and what would make it fit."""

from __future__ import annotations

from abmll.config import Config
from abmll.config.deepspeed import engine_settings
from abmll.memory.plan import GB, Plan, plan_run, remedies
from abmll.memory.table import decisions, largest_table, peak_table, phase_table, verdict
from abmll.models.load import describe, model_config

BASELINE = "lora"


def show_plan(config: Config, config_path: str, ranks: int, gpu: bool) -> bool:
    """Print it; whether the run fits memory.budget_gb. ValueError for what the configuration names and is not there."""
    deepspeed = engine_settings(config, config_path)
    architecture = model_config(config.model)
    print(describe(config.model))
    tasks = config.tasks
    print(
        f"{config.method.name}, {config.adapters.posterior} posterior, rank {config.adapters.rank}; batches of "
        f"{tasks.batch_size} prompts of {tasks.max_tokens} tokens; on a {'GPU' if gpu else 'CPU'}, counted in GB (1e9 "
        "bytes)"
    )
    # a sharded base is planned for its ranks; else each rank takes about what one alone does
    shared = ranks if config.model.sharding == "full" else 1
    plan = plan_run(config, architecture, deepspeed, shared, gpu)
    if plan.ledger is None:
        raise ValueError(f"model.name: {config.model.name!r}: {verdict(plan)}; measure it with --profile on a GPU")
    alike = (plan.checkpointing,)  # what stands beside it is counted with the same
    on_shared = f"{shared} rank{'s' if shared > 1 else ''}"
    plans = {f"{config.method.name}, {on_shared}": plan}
    if ranks > shared:
        plans[f"{config.method.name}, {ranks} ranks"] = plan_run(
            config, architecture, deepspeed, ranks, gpu, policies=alike
        )
    if config.method.name != BASELINE:
        method = config.method.model_copy(update={"name": BASELINE})
        baseline = config.model_copy(update={"method": method})
        baseline_plan = plan_run(baseline, architecture, deepspeed, shared, gpu, policies=alike)
        plans[f"plain LoRA ({BASELINE}), {on_shared}"] = baseline_plan
    print(f"\nEach rank's peak\n\n{peak_table({name: found.ledger for name, found in plans.items()})}")
    print(f"\n{config.method.name}, {on_shared}, by phase\n\n{phase_table(plan.ledger)}")
    print(f"\nLargest at the peak\n\n{largest_table(plan.ledger)}")
    print(f"\n{decisions(plan)}\n{verdict(plan)}")
    if not plan.fits:
        _show_remedies(plan, ranks)
    return plan.fits


def _show_remedies(plan: Plan, ranks: int) -> None:
    print("\nTried:")
    fitting = False
    for remedy in remedies(plan):
        fitting |= remedy.plan.fits
        print(f"  {' '.join(remedy.overrides)}\n      {verdict(remedy.plan)}; {decisions(remedy.plan)}")
    model = plan.setup.config.model
    if not fitting and ranks > 1 and model.sharding == model.quantization == "none":
        config = plan.setup.config.model_copy(update={"model": model.model_copy(update={"sharding": "full"})})
        setup = plan.setup
        sharded = plan_run(config, setup.architecture, setup.deepspeed, ranks, setup.gpu)
        fitting = sharded.fits
        print(f"  model.sharding=full on {ranks} ranks\n      {verdict(sharded)}; {decisions(sharded)}")
    if not fitting:
        print(f"Nothing of this is enough for {plan.budget / GB:g} GB: take a smaller model, or a larger GPU")
