"""Lines of preferences, and of completions in two rows, that are broken; see `mutation_list.py`."""

from mutation import Mutation

PREFERENCE = (
    Mutation(
        "the rejected answer is preferred",
        "stack/objectives/preference.py",
        "chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]",
        "rejected, chosen = rewards[:, 0::2], rewards[:, 1::2]",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "preferences have no reference",
        "stack/objectives/preference.py",
        "ratio = policy - batch[self.reference]",
        "ratio = policy",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "what both answers begin with is predicted",
        "stack/objectives/preferred.py",
        "first[1][:shared] = second[1][:shared] = 0",
        "first[1][:0] = second[1][:0] = 0",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "what a reference tells goes to another row",
        "stack/objectives/preferred.py",
        "self.reference[2 * pieces.start : 2 * pieces.stop]",
        "self.reference[pieces.start : pieces.start + 2 * len(pieces)]",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "labels weigh alike in the gradient of the table",
        "stack/kernels/linear_cross_entropy/xla_chunked.py",
        "_weigh(hidden, weights),\n            preferred",
        "hidden,\n            preferred",
        "tests/kernels/linear_cross_entropy/test_label_nll.py",
    ),
    Mutation(
        "the reference of a run that goes on is the run itself",
        "stack/train/reference.py",
        "is_first = ledger.begins and not int(now",
        "is_first = True or not int(now",
        "tests/train/test_preference.py",
    ),
    Mutation(
        "a reference that is there is computed again",
        "stack/train/reference.py",
        "if not all_say(entry is not None):",
        "if True:",
        "tests/train/test_preference.py",
    ),
    Mutation(
        "a process keeps the reference that others lack",
        "stack/train/reference.py",
        "        remove_entry(folder)",
        "        pass",
        "tests/train/test_preference.py",
    ),
    Mutation(
        "rows are packed by what is read alone",
        "stack/objectives/completion.py",
        "np.maximum(lengths - marked + 1, -(-marked * length // target_length))",
        "lengths - marked + 1",
        "tests/objectives/test_completion_two_rows.py",
    ),
)
