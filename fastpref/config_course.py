"""Options of a run: loss, optimizer, batches, intervals, loggers, and what is recorded."""

from __future__ import annotations

import dataclasses

from fastpref.config_input import InputOptions
from fastpref.config_options import LR_SCHEDULER_KWARGS, OPTIM_ARGS
from fastpref.config_values import Options, option
from fastpref.probe_types import DEFAULT_PROBE_TYPES, PROBE_TYPES

DEFAULT_TOKENS = 16384  # of a micro-batch, where nobody plans


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CourseOptions(InputOptions):
    """Fields of `fastpref.config.Config`, second half."""

    loss_type: tuple[str, ...] = option(
        ("sigmoid",), "loss", "Names of the loss table (docs/losses.md), one or a list to add up."
    )
    loss_weights: tuple[float, ...] = option(
        (), "loss", "Weight of each loss of a list, in its order; empty: 1 each."
    )
    beta: float = option(0.1, "loss", "Strength of the pull to the reference.", within="positive")
    label_smoothing: float = option(
        0.0, "loss", "Probability that a label is wrong, for losses that know of it.",
        within="smoothing",
    )  # fmt: skip
    f_divergence_type: str = option(
        "reverse_kl",
        "loss",
        "Divergence from the reference that the rewards are derived from.",
        ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = option(0.5, "loss", "Alpha of alpha_divergence.")
    ld_alpha: float | None = option(
        None,
        "loss",
        "Weight of the tokens beyond the shorter completion's length (LD-DPO); null: 1.",
        within="ratio",
    )
    use_weighting: bool = option(
        False, "loss", "Weigh pairs by how likely the policy is to write them (WPO)."
    )
    discopop_tau: float = option(0.05, "loss", "Temperature of discopop.", within="positive")
    simpo_gamma: float = option(
        0.5, "loss", "Margin that simpo asks for, beta included.", within="at least 0"
    )
    cpo_alpha: float | None = option(
        None, "loss", "Weight of cpo's likelihood term; null: 1.", within="at least 0"
    )
    rpo_alpha: float | None = option(
        None, "loss", "Weight of rpo's likelihood term; null: 1.", within="at least 0"
    )
    balance: str = option(
        "none",
        "loss",
        "Weigh the losses of behaviors so that their margins, or update rates, have the shares of "
        "target_share; an experiment (docs/balance.md).",
        ("none", "margins", "rates"),
    )
    target_share: Options = option(
        (),
        "loss",
        "Wanted shares, as name=0.2,other=0.3; what is left goes evenly to the other behaviors.",
    )
    balance_every: int = option(
        10, "loss", "Steps between two updates of the weights.", within="at least 1"
    )
    balance_limit: float = option(
        4.0, "loss", "Weights lie between 1/balance_limit and this.", within="more than 1"
    )
    balance_gain: float = option(
        0.5,
        "loss",
        "Part of the way to the target share, as a logarithm, that an update goes.",
        within="positive",
    )
    router_aux_loss_coef: float | None = option(
        None,
        "loss",
        "Weight of a mixture of experts' load-balancing loss; null: the model's own; 0: none.",
        within="at least 0",
    )
    sync_ref_model: bool = option(
        False, "loss", "The reference follows the policy (TR-DPO); a second model in memory."
    )
    ref_model_mixup_alpha: float = option(
        0.6, "loss", "Part of the policy in the reference at every sync.", within="mixup"
    )
    ref_model_sync_steps: int = option(
        512, "loss", "Steps between two syncs of the reference.", within="at least 1"
    )

    optim: str = option(
        "adamw_torch", "optimizer", "Optimizer, by transformers' name.", tuple(OPTIM_ARGS)
    )
    optim_args: Options = option(
        (), "optimizer", "Options of sgd, rmsprop or adafactor: momentum=0.9,nesterov=true."
    )
    learning_rate: float = option(1e-6, "optimizer", "Highest learning rate.", within="at least 0")
    weight_decay: float = option(
        0.0, "optimizer", "Not applied to biases and norm weights.", within="at least 0"
    )
    adam_beta1: float = option(0.9, "optimizer", "AdamW's first decay rate.", within="fraction")
    adam_beta2: float = option(0.999, "optimizer", "AdamW's second decay rate.", within="fraction")
    adam_epsilon: float = option(1e-8, "optimizer", "AdamW's epsilon.", within="positive")
    max_grad_norm: float = option(
        1.0, "optimizer", "Clip the global gradient norm to this; 0: never.", within="at least 0"
    )
    lr_scheduler_type: str = option(
        "linear",
        "optimizer",
        "Shape of the learning rate after the warm-up, by transformers' name.",
        tuple(LR_SCHEDULER_KWARGS),
    )
    lr_scheduler_kwargs: Options = option(
        (), "optimizer", "Options of the schedule, as transformers calls them: min_lr_rate=0.1."
    )
    warmup_ratio: float | None = option(
        None,
        "optimizer",
        "Part of all steps in which the rate rises from 0; null: 0.1, unless warmup_steps is set.",
        within="ratio",
    )
    warmup_steps: float | None = option(
        None,
        "optimizer",
        "Steps in which the rate rises from 0, or, below 1, their part of all steps.",
        within="warmup",
    )

    num_train_epochs: float = option(
        1.0, "batch", "Passes over the training pairs; may be fractional.", within="positive"
    )
    max_steps: int = option(
        -1, "batch", "Optimizer steps, in place of num_train_epochs; -1: unset.", within="steps"
    )
    train_batch_size: int = option(
        32, "batch", "Pairs per optimizer step, over all ranks together.", within="at least 1"
    )
    max_tokens_per_microbatch: int = option(
        DEFAULT_TOKENS,
        "batch",
        "Packed tokens per forward, with trainable: head scored rows: the memory dial; results do "
        "not depend on it. 0: the most that fit, up to 16384 (docs/plan.md).",
        within="at least 0",
    )  # fmt: skip
    stratify: bool = option(
        False, "batch", "Every step draws from all behaviors and labels in their proportion."
    )
    shuffle: bool = option(True, "batch", "A new order every epoch, decided by the seed alone.")

    logging_steps: int = option(
        10, "intervals", "Steps between two lines of metrics.jsonl.", within="at least 1"
    )
    logging_first_step: bool = option(
        False, "intervals", "Write a line for the first step too, whatever logging_steps says."
    )
    eval_steps: int = option(
        50,
        "intervals",
        "Steps between two evaluations, the last step included; 0: none.",
        within="at least 0",
    )
    eval_on_start: bool = option(
        True, "intervals", "Evaluate at step 0 too, where every behavior's curve begins."
    )
    save_steps: int = option(
        100,
        "intervals",
        "Steps between two checkpoints; the records' parts end at the same steps.",
        within="at least 1",
    )
    save_total_limit: int | None = option(
        None,
        "intervals",
        "Checkpoints to keep: the newest, and the best if load_best_model_at_end; null: all.",
        within="at least 1",
    )

    metric_for_best_model: str | None = option(
        None,
        "best",
        "A metric of the held-out pairs (docs/metrics.md); null: loss, if one is needed.",
    )
    greater_is_better: bool | None = option(
        None, "best", "Whether a larger metric is better; null: unless its name ends in loss."
    )
    load_best_model_at_end: bool = option(
        False,
        "best",
        "The final model is that of the best evaluation, of which a checkpoint is kept.",
    )
    early_stopping_patience: int | None = option(
        None,
        "best",
        "Evaluations without a better metric after which the run stops; null: never.",
        within="at least 1",
    )
    early_stopping_threshold: float = option(
        0.0, "best", "An evaluation counts as better only where it is so by more than this.",
        within="at least 0",
    )  # fmt: skip

    report_to: tuple[str, ...] = option(
        (), "loggers", "tensorboard, wandb, trackio, several of them, or none."
    )
    run_name: str | None = option(
        None, "loggers", "Name of the run in wandb and trackio; null: that of output_dir."
    )
    project: str | None = option(
        None,
        "loggers",
        "Project of wandb and trackio; null: WANDB_PROJECT or TRACKIO_PROJECT, else fastpref.",
    )
    logging_dir: str | None = option(
        None,
        "loggers",
        "Folder of TensorBoard's event files; null: TENSORBOARD_LOGGING_DIR, else tensorboard in "
        "output_dir.",
    )
    disable_tqdm: bool = option(False, "loggers", "Show no progress bar.")
    peak_tflops: float | None = option(
        None,
        "loggers",
        "TFLOP/s of the device's products in dtype, for MFU; null: from a table of NVIDIA GPUs, "
        "and no MFU for others (docs/perf.md).",
        within="positive",
    )
    profile: int = option(
        0,
        "loggers",
        "Steps after the warm-up that torch's profiler traces into profile/ of output_dir, for "
        "ui.perfetto.dev; 0: none.",
        within="at least 0",
    )

    record: bool = option(True, "dynamics", "Write records/: every pair, every step, as Parquet.")
    track: str = option(
        "head",
        "dynamics",
        "Gradient norms per pair, in the records if there are any; head: of the head, exact; "
        "sketch, exact: of all trained weights, by layer group (docs/taps.md).",
        ("none", "head", "sketch", "exact"),
    )
    track_every: int = option(
        1, "dynamics", "Steps between two tracked steps.", within="at least 1"
    )
    sketch_dim: int = option(16, "dynamics", "Width of a gradient sketch.", within="at least 1")
    rate_every: int = option(
        10,
        "dynamics",
        "Steps between two whose update rates are measured, with track: sketch or exact; 0: none.",
        within="at least 0",
    )
    rate_pairs: int = option(
        16,
        "dynamics",
        "Training pairs of each behavior that update rates are measured on.",
        within="at least 1",
    )
    probe_every: int = option(
        0,
        "dynamics",
        "Steps between two evaluations of the probes, steps 0 and the last included; 0: none.",
        within="at least 0",
    )
    probes: str | None = option(
        None,
        "dynamics",
        "File of probes: prompt, response, response_type; also behavior and id (docs/probes.md).",
    )
    probe_prompts: int = option(
        64,
        "dynamics",
        "Training pairs whose prompts are probed, in turn from every behavior.",
        within="at least 0",
    )
    probe_types: tuple[str, ...] = option(
        DEFAULT_PROBE_TYPES,
        "dynamics",
        f"Responses to these prompts that are scored: {', '.join(PROBE_TYPES)}.",
    )
    probe_influence: bool = option(
        False,
        "dynamics",
        "Measure how each behavior's pairs move the probes; needs track: sketch or exact, and a "
        "backward over the probes every probe_every steps.",
    )
    ref_cache_dir: str | None = option(
        None, "dynamics", "Reference log-probs; null: the user's cache folder."
    )
    feature_cache_dir: str | None = option(
        None, "dynamics", "Hidden states of trainable: head; null: the user's cache folder."
    )
    ref_check_pairs: int = option(
        8,
        "dynamics",
        "Pairs whose cached log-probs, or states, are computed again at the start and compared.",
        within="at least 0",
    )
    on_nonfinite: str = option("stop", "dynamics", "At a loss that is not finite.", ("stop",))
