"""Mutants of the blocks, which a network's gradients, statistics and evaluation must catch."""

import pytest
import torch
from block_cases import check_evaluation, check_training, skip_overflow_checks
from kernel_checks import Mutants

from kernels import composed, fused, fused_conv_bn_relu, fused_preact

COMPOSED = {
    "shortcut_forgotten": ("shortcut, *shortcut_affine,", "shortcut * 0, None, None,"),
    "shortcut_without_bn_relu": ("shortcut_affine = x, affine1", "shortcut_affine = x, (None, None)"),
    "running_statistics_not_updated": ("    update_running(bn, norm.detach())\n", ""),
    "gradient_of_the_statistics_dropped": ("return y, partials if", "return y, partials.detach() if"),
    "other_eps": ("affine2 = _affine(h, partials, bn2)", "affine2 = _affine(h, partials, bn2._replace(eps=1e-2))"),
}
FUSED = {
    "running_statistics_of_bn2_not_updated": ("    update_running(bn2, norm2)\n", ""),
    "running_statistics_swapped": ("    update_running(bn1, norm1)\n", "    update_running(bn1, norm1 + 1)\n"),
    "wrong_statistics_handed_on": ("return y, partials if", "return y, partials * 1.1 if"),
    "stale_statistics_used": ("partials_for(bn1, x, statistics),", "partials_for(bn1, x * 2),"),
    "betas_swapped": ("        bn1.beta,\n", "        bn1.beta * 0,\n"),
}
CONV_BN_RELU = {
    "residual_forgotten": ("norm[4], residual, pool", "norm[4], None, pool"),
    "residual_gradient_forgotten": ("dout if ctx.has_residual else None, None", "None, None"),
    "pool_forgotten_in_apply_backward": ('coefficients, pool == "last")', '2 * coefficients, pool == "last")'),
    "dx_from_dout": ("dx, _ = dgrad(dy, w,", "dx, _ = dgrad(2 * dy, w,"),
    "pixels_after_the_pool": ("else z.numel() / z.shape[1]", "else dout.numel() / z.shape[1]"),
    "statistics_treated_as_constants": ("has_residual = running is not None,", "has_residual = True,"),
}
POOL_FIRST = {"statistics_before_a_pool_that_comes_first": ("partials = bn_stats(z)", "partials = bn_stats(y)")}
PREACT = {
    "shortcut_gradient_forgotten": ("stride, shortcut, a, forced)", "stride, None, a, forced)"),
    "shortcut_gradient_twice": ("shortcut = dy if w3 is None", "shortcut = 2 * dy if w3 is None"),
    "shortcut_without_bn_relu": ("shortcut = a if w3 is None", "shortcut = Activation(x) if w3 is None"),
    "statistics_of_h_handed_on": ("return y, partials_y, h,", "return y, partials_h.clone(), h,"),
    "dw1_from_dz": ("dw = [wgrad(a, dh, 3,", "dw = [wgrad(a, bn_backward_apply(dh, h, norm2, coefficients2), 3,"),
    "dw2_without_prologue": ("wgrad(b, dy, 3, 1, forced)]", "wgrad(Activation(h), dy, 3, 1, forced)]"),
    "dbeta_for_dgamma": ("dx, None, of_bn1[0], of_bn1[1]", "dx, None, of_bn1[1], of_bn1[0]"),
    "pixels_of_x_for_h": ("for t in (x, h))", "for t in (x, x))"),
    "statistics_treated_as_constants": ("ctx.constant = running2 is not None", "ctx.constant = True"),
    "other_eps": ("beta1, eps1)", "beta1, 1e-2)"),
}
EVALUATION = {"constants_forgotten": ("ctx.constant = running2 is not None", "ctx.constant = False")}


def checked(check, network: str, replaced: tuple | None = None):
    """`check` of `network` with a mutant of a whole implementation, or of `fused` with (module, op) replaced."""

    def check_mutant(changed, device) -> None:
        with pytest.MonkeyPatch.context() as patch:
            skip_overflow_checks(patch)
            if replaced:
                patch.setattr(*replaced, getattr(changed, replaced[1]))
            check(fused if replaced else changed, network, device)

    return check_mutant


def training(ops, network: str, device) -> None:
    check_training(ops, network, torch.float32, device)


def row(module, op: str, changes: dict, check, network: str) -> Mutants:
    return Mutants(module, changes, checked(check, network, (module, op)), guarded=False)


ROWS = {
    "composed": Mutants(composed, COMPOSED, checked(training, "two_blocks"), guarded=False),
    "fused": Mutants(fused, FUSED, checked(training, "two_blocks"), guarded=False),
    "conv_bn_relu": row(fused_conv_bn_relu, "conv_bn_relu", CONV_BN_RELU, training, "resnet9_pool_last"),
    "conv_bn_relu_pool_first": row(fused_conv_bn_relu, "conv_bn_relu", POOL_FIRST, training, "resnet9_pool_first"),
    "preact_block": row(fused_preact, "preact_block", PREACT, training, "two_blocks"),
    "preact_block_evaluation": row(fused_preact, "preact_block", EVALUATION, check_evaluation, "two_blocks_after_a_bn"),
}
