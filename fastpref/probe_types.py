"""Types of responses that can be made from a run's own pairs; names after Ren & Sutherland."""

CHOSEN = "chosen"
REJECTED = "rejected"
INITIAL = "initial"  # their chosen_initial is sampled from the data's model; this is greedy
IRR_TRAIN = "irr_train"
IRR_TEST = "irr_test"
RANDOM_PERMUTE = "random_permute"
RANDOM_TOKENS = "random_tokens"

PROBE_TYPES = {
    CHOSEN: "the pair's chosen completion",
    REJECTED: "the pair's rejected completion",
    INITIAL: "the answer of the model as training begins, by greedy decoding",
    IRR_TRAIN: "the chosen completion of another training prompt",
    IRR_TEST: "the chosen completion of a held-out prompt",
    RANDOM_PERMUTE: "the tokens of the chosen completion in a random order",
    RANDOM_TOKENS: "random tokens, as many as the chosen completion has",
}
DEFAULT_PROBE_TYPES = (CHOSEN, REJECTED, INITIAL, IRR_TRAIN, RANDOM_PERMUTE)
