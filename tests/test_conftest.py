"""What conftest.py asks of torch and of the environment holds while tests run."""

import os

import torch


def test_references_on_a_gpu_multiply_and_sum_in_fp32():
    products = torch.backends.cuda.matmul
    assert products.allow_bf16_reduced_precision_reduction is False
    assert products.allow_fp16_reduced_precision_reduction is False
    assert products.allow_tf32 is False and torch.get_float32_matmul_precision() == "highest"


def test_a_test_that_runs_the_command_keeps_no_memory():
    assert os.environ["UVG_KEEP_MEMORY"] == "0" and os.environ["GOMP_SPINCOUNT"]
