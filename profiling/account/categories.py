"""The category of a kernel, from the operations that launched it and from its name.

The operation decides where it can: the same elementwise kernel adds a shortcut or steps an optimiser. The name decides
where an operation launches kernels of several kinds (a convolution also transposes its operands), and where none is
known. A kernel that neither tells is "unknown".

Names are those of cuDNN 7 to 9, cuBLAS, CUTLASS, ATen, torch.compile, MIOpen and the libraries of large models in
published traces of torch.profiler, and this project's own. Template arguments only name the types that a function works
on. In 44 traces from the test data of AMD-AGI/TraceLens and facebookresearch/HolisticTraceAnalysis (language, vision
and recommendation models, V100 to B200 and MI210 to MI300X) at most 0.1 % of the kernel time of a trace is in a
category that the name contradicts; a name without a purpose (elementwise, reduce, fill) contradicts none, nor a matrix
product an optimiser's step.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from profiling.account.trace import Kernel

CATEGORIES = (
    "convolution",
    "batch norm",
    "memory-bound",
    "layout and cast",
    "optimiser and loss",
    "unknown",
    "augmentation and data",
    "communication",
)
"""In the order in which concurrent kernels are counted: what runs behind another kernel costs nothing.

"convolution" is convolutions and matrix products; "batch norm" includes what is fused behind it; "memory-bound" is
pooling, additions, ReLU and the like.
"""

AUGMENTATION = "augmentation"
"""The annotation (`record_function`) around the making of a batch."""


def categorise(kernel: Kernel) -> str:
    """One of CATEGORIES."""
    return _category("" if kernel.kind == "cpu" else kernel.name, kernel.ops)


_Table = tuple[tuple[str, re.Pattern[str]], ...]


def _patterns(*rows: tuple[str, str]) -> _Table:
    """A table from (category, patterns with spaces between)."""
    return tuple((category, re.compile("|".join(patterns.split()))) for category, patterns in rows)


# Operations are looked up by their names as `_simplified` leaves them.

_CONTEXTS = _patterns(
    ("communication", r"c10d c10dfunctional gloo: nccl: recordparamcomms"),
    ("augmentation and data", rf"{AUGMENTATION}$ cifar::augment enumeratedataloader .*dataloaderiter"),
    ("optimiser and loss", r"optimizer(step|zerograd) \w*loss logsoftmax"),
)
"""Operations that give their category to everything inside; the beginnings of their names."""

_OPERATIONS = _patterns(
    (
        "convolution",
        r"""cifar::conv(fprop|dgrad|wgrad) \w*conv(olution|depthwise|transpose)?([123]d)?(transpose|forward|add|relu)*
        (?!triton)\w*attention\w*
        (sparse)?(addmm|mm|bmm|baddbmm|matmul|mv|addmv|dot|linear|mkldnnlinear\w*|einsum|scaledmm)""",
    ),
    ("batch norm", r"\w*batchnorm\w* cifar::bn\w+ foreachlerp"),
    (
        "optimiser and loss",
        r"""cifar::sgd fused(sgd|adamw?) foreach\w+ (torch::autograd::)?accumulategrad linalgvectornorm argmax
        item localscalardense bincount""",
    ),
    ("layout and cast", r"copy tocopy to toc\w+ contiguous clone cat stack constantpadnd pad mkldnnreordertensor"),
    ("augmentation and data", r"index indexselect pinmemory randperm"),
    ("memory-bound", r"(safe)?softmax gather scatter\w* embedding\w* (unique|searchsorted|repeatinterleave)\w*"),
)
"""The innermost of these decides."""

_PARTS = _patterns(
    (
        "memory-bound",
        r"""\w*pool[123]d\w* relu threshold clamp(min|max)? hardtanh sigmoid tanh gelu silu dropout mean sum a?max a?min
        add sub rsub mul div neg abs exp log r?sqrt reciprocal pow square lerp addc(mul|div) cumsum var(mean)? std norm
        eq ne g[te] l[te] where and or any all isfinite bitwise\w+ logical\w+ maskedfill fill zeros? ones? full arange
        (zeros|ones|full|empty)like scalartensor uniform normal random (native|fused)*(layer|group|rms)norm sort topk
        flip indexput indexcopy reflectionpad[123]d upsample\w+""",
    )
)
"""Operations that have their category unless one around them has another: then they are parts of it."""

# Kernels by what `_function` leaves of their names.

_COMMUNICATION = re.compile(
    r"nccl|rccl|memcpy\sptop|all_?reduce|all_?gather|reduce_?scatter|all_?(to|2)_?all|cross_device_reduce|nvshmem|deep_ep"
    r"|symm(etric)?_?mem|\bbarrier|multimem|mscclpp"
)
"""Communication, whatever operation is around it: waiting for other processes is no operation's work."""

_OF_ONE_PURPOSE = _patterns(
    ("augmentation and data", r"^augment_kernel memcpy\shtod memcpy\sdtoh"),
    ("convolution", r"^conv_(fprop|dgrad|wgrad)\w*_kernel [a-z]\d*cudnn_"),  # ..s884cudnn_.._nhwc2nchw_tn_v1
    ("batch norm", r"^bn_\w+_kernel"),
    ("optimiser and loss", r"^sgd_(check_)?kernel"),
    (
        "layout and cast",
        r"""(nchw|nhwc|cnhw)_?(to|2)_?(nchw|nhwc|cnhw) (nhwc|nchw)addpadding convert_?tensor tensortransform
        subtensoropwithcast batched_transpose transpose_?(kernel|readwrite|[34]d) direct_copy float\d*_copy_kernel""",
    ),
)
"""Kernels of one category, whatever operation launched them."""

_KERNELS = _patterns(
    ("memory-bound", r"pooling_?[fb]w (layer|group|rms)_?norm reshape_and_cache store_?kv finalize routing"),
    ("augmentation and data", r"index_elementwise vectorized_gather indexselect"),
    ("layout and cast", r"\bcopy_kernel catarraybatchedcopy memcpy\sdtod memcpy32_post"),
    ("batch norm", r"\bbn_(fw|bw) batch_?norm bnfwd bnbwd grad_bias_scales"),  # scale and bias: cuDNN's gamma and beta
    ("optimiser and loss", r"multi_tensor_apply softmax nll_loss sgd cross_entropy argmax"),
    (
        "convolution",
        r"""(?<!fb)gemm ^bmm_ gemv xmma cutlass nvjet fprop dgrad wgrad winograd cudnn cublas cask convolve fft2d cijk_
        tensorop conv(olution)?([123]d|fwd|bwd|_) miopen\w*conv gridwise_conv flash(?!infer) fmha attn attention
        sage_fwd matmul dot_kernel splitk computeoffsets epilogue::impl""",
    ),
    (
        "memory-bound",
        r"""elementwise reduce pool dropout distribution fill memset relu gelu silu act_and_mul rotary embed embs quant
        cub:: rocprim thrust sort scan topk gather scatter index indices permute recat histogram segments gammabeta
        moments upsample clamp copy repeat_interleave compute_cuda_kernel""",
    ),
)

_COMPILED_KERNELS = _patterns(
    ("convolution", r"^triton_tem_"),
    ("batch norm", r"batch_norm var_mean"),
    ("optimiser and loss", r"^triton_for_ log_softmax nll_loss cross_entropy foreach fused_sgd"),
    (
        "layout and cast",
        r"""^triton_[a-z]{3}_fused(_(_to_copy|_unsafe_view|clone|permute|view|convert_element_type|convolution))+(_\d+)?$""",
    ),
    ("memory-bound", r"^triton_[a-z]{3}_fused"),
)
"""Kernels of torch.compile, named after the operations in them. Only its templates multiply matrices: another kernel
with a product in its name reorders that product's operand or reads its result."""

_FRAME = re.compile(
    r"\b(\w*elementwise_kernel\w*|reduce_kernel|kernel2?|device_kernel|kentry|trampoline_kernel)$", re.ASCII
)
"""Functions that do what their template arguments say."""

_HOST = _patterns(
    ("data", rf"{AUGMENTATION}$ enumeratedataloader .*dataloaderiter"),
    ("sync", r"item$ localscalardense"),
    ("optimiser", r"optimizer(step|zerograd)"),
)


def host_work(op: str) -> str | None:
    """The host's work inside of `op`: "data" for a batch, "sync" with the device, "optimiser", or None for another."""
    return _find(_HOST, _simplified(op), re.Pattern.match)


@functools.lru_cache(maxsize=1 << 14)
def _category(name: str, ops: tuple[str, ...]) -> str:
    kernel = _function(name).lower()
    if _COMMUNICATION.search(kernel):
        return "communication"
    contexts, own, parts = zip(*map(_of_operation, ops), strict=True) if ops else ((), (), ())
    by_name = _find(_COMPILED_KERNELS if kernel.startswith("triton_") else _KERNELS, kernel)
    said = (*contexts, _find(_OF_ONE_PURPOSE, kernel), *reversed(own), *parts, by_name, "unknown")
    return next(filter(None, said))


@functools.lru_cache(maxsize=1 << 14)
def _of_operation(op: str) -> tuple[str | None, str | None, str | None]:
    """Its category by _CONTEXTS, by _OPERATIONS and by _PARTS."""
    name, whole = _simplified(op), re.Pattern.fullmatch
    return _find(_CONTEXTS, name, re.Pattern.match), _find(_OPERATIONS, name, whole), _find(_PARTS, name, whole)


def _function(name: str) -> str:
    """A kernel's name without template and call arguments; a frame's with them. Of a mangled name, its qualified parts.

    "void at::native::fill<int>(int*)" is "void at::native::fill", "_ZN2ck4gemmIfE" is "ck::gemm".
    """
    if mangled := re.match(r"_ZN?K?(?=\d)", name):
        parts, rest = [], name[mangled.end() :]
        while length := re.match(r"\d{1,4}", rest):
            end = length.end() + int(length[0])
            parts.append(rest[length.end() : end])
            rest = rest[end:]
        function = "::".join(parts)
    else:
        kept, open_ = [], []
        for piece in re.split(r"(->|[<>()])", name.replace("(anonymous namespace)::", "")):
            if piece == "(" or (piece == "<" and "(" not in open_[-1:]):  # within parentheses < may be an operator
                open_.append(piece)
            elif piece == ")" and "(" in open_:
                while open_.pop() != "(":
                    pass
            elif piece == ">" and open_[-1:] == ["<"]:
                open_.pop()
            elif not open_:
                kept.append(piece)
        function = "".join(kept)
    return name if _FRAME.search(function.lower()) else function


def _find(table: _Table, name: str, matches: Callable[[re.Pattern[str], str], Any] = re.Pattern.search) -> str | None:
    return next((category for category, pattern in table if matches(pattern, name)), None)


def _simplified(op: str) -> str:
    """ "aten::max_pool2d_with_indices_backward" and "MaxPool2DWithIndicesBackward0" are one operation."""
    op = op.removeprefix("autograd::engine::evaluate_function: ").removeprefix("aten::")
    return re.sub(r"backward(data)?\d*$", "", re.sub(r"[_ .()]", "", op.lower()))
