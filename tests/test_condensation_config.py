"""The arguments of training: values that are refused, and those of each dataset."""

import pytest
from support.training import config

from btok_hf.training import CondensationConfig


def test_bad_values_are_refused(tmp_path):
    for wrong in ("positve", {"p": "target"}, None):
        with pytest.raises(ValueError, match="condense must be one of positive, query, both, none"):
            config(tmp_path, condense=wrong)
    for name, value in (
        ("temperature", 0),
        ("mini_batch_size", 0),
        ("mini_batch_num_tokens", 0),
        ("max_target_length", 0),
        ("block_size", 0),
        ("condensation_weight", -1),
        ("condensation_steps", -1),
        ("neftune_noise_alpha", 5.0),
        ("auto_find_batch_size", True),
        ("bf16_full_eval", True),
        ("train_sampling_strategy", "group_by_length"),
        ("label_smoothing_factor", 0.5),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            config(tmp_path, **{name: value})
    assert config(tmp_path, neftune_noise_alpha=0, label_smoothing_factor=0).neftune_noise_alpha == 0  # off
    with pytest.raises(ValueError, match="include_num_input_tokens_seen must be left out, got all: it would count"):
        config(tmp_path, include_num_input_tokens_seen=True)


def test_mappings_may_be_json(tmp_path):
    args = config(tmp_path, condense='{"a": "query"}', dataset_weights='{"a": 2.5}')
    assert args.condense == {"a": "query"} and args.dataset_weights == {"a": 2.5}


def test_the_side_to_generate_is_one_value_or_one_per_dataset(tmp_path):
    assert config(tmp_path, condense="both").condense_for("a") == config(tmp_path, condense="both").condense_for(None)
    args = config(tmp_path, condense={"a": "query", "b": "none"})
    assert (args.condense_for("a"), args.condense_for("b")) == ("query", "none")
    with pytest.raises(ValueError, match=r"condense names the datasets \['a', 'b'\] but not 'c'\. Add it"):
        args.condense_for("c")


def test_warm_up_is_a_part_of_all_steps():
    def steps(**options):
        return CondensationConfig("unused", report_to="none", use_cpu=True, **options).get_warmup_steps(300)

    assert (steps(), steps(warmup_steps=100), steps(warmup_steps=0)) == (30, 100, 0)
    assert steps(warmup_ratio=0.2) == 60
