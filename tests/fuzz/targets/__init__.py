"""All that reads what others wrote, by name."""

from tests.fuzz.targets import adapters, checkpoints, rules, serving, training
from tests.fuzz.targets.base import Target

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        adapters.ADAPTERS,
        adapters.PLANS,
        rules.RULES,
        rules.CONFIGS,
        rules.NAMES,
        checkpoints.CHECKPOINTS,
        checkpoints.FOLDS,
        training.RUNS,
        training.EXAMPLES,
        serving.GRAPHS,
        serving.ONNX_ADAPTERS,
        serving.SERVED,
        serving.ANSWERED,
    )
}
