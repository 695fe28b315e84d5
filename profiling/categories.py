"""What kind of work a kernel does, from the operations that launched it and from its name.

The operation decides where it can: the same elementwise kernel adds a shortcut or steps an optimiser. The name decides
where an operation launches kernels of several kinds (a convolution also transposes its operands), and where none is
known. What neither tells is "unknown".

Names of kernels are those of cuDNN 7 to 9, cuBLAS, CUTLASS, ATen, torch.compile and MIOpen as they stand in published
traces and tables of torch.profiler, and this project's own.
"""

import functools
import re

from profiling.trace import Kernel

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
    """Of (category, patterns with spaces between)."""
    return tuple((category, re.compile("|".join(patterns.split()))) for category, patterns in rows)


# Operations are looked up by their names as `_simplified` leaves them.

_CONTEXTS = _patterns(
    ("communication", r"c10d c10dfunctional gloo: nccl: recordparamcomms"),
    ("augmentation and data", rf"{AUGMENTATION}$ cifar::augment enumeratedataloader .*dataloaderiter"),
    ("optimiser and loss", r"optimizer(step|zerograd) crossentropyloss nllloss logsoftmax"),
)
"""Operations of which everything inside has their category, whatever it is; the beginnings of their names."""

_OPERATIONS = _patterns(
    (
        "convolution",
        r"""cifar::conv(fprop|dgrad|wgrad) \w*conv(olution|depthwise|transpose)?([123]d)?(transpose|forward|add|relu)*
        \w*attention\w* (sparse)?(addmm|mm|bmm|baddbmm|matmul|mv|addmv|dot|linear|mkldnnlinear\w*|einsum|scaledmm)""",
    ),
    ("batch norm", r"\w*batchnorm\w* cifar::bn\w+ foreachlerp"),
    (
        "optimiser and loss",
        r"""cifar::sgd fused(sgd|adamw?) foreach\w+ (torch::autograd::)?accumulategrad linalgvectornorm softmax argmax
        item localscalardense bincount""",
    ),
    ("layout and cast", r"copy tocopy to toc\w+ contiguous clone cat stack constantpadnd pad mkldnnreordertensor"),
    ("augmentation and data", r"index indexselect gather pinmemory randperm"),
)
"""The innermost operation that is one of these decides."""

_PARTS = _patterns(
    (
        "memory-bound",
        r"""\w*pool[123]d\w* relu threshold clamp(min|max)? hardtanh sigmoid tanh gelu silu dropout mean sum a?max a?min
        add sub rsub mul div neg abs exp log r?sqrt reciprocal pow square lerp addc(mul|div) cumsum var(mean)? std norm
        eq ne g[te] l[te] where and or any all isfinite bitwise\w+ logical\w+ maskedfill fill zeros? ones? full arange
        (zeros|ones|full|empty)like scalartensor uniform normal random (native)?(layer|group|rms)norm sort topk flip
        indexput reflectionpad[123]d""",
    )
)
"""Operations that have their category only where none of those around them has another: they are parts of these."""

# Kernels by their names in lower case.

_OF_ONE_PURPOSE = _patterns(
    ("communication", r"nccl rccl memcpy\sptop"),
    ("augmentation and data", r"^augment_kernel memcpy\shtod memcpy\sdtoh"),
    ("convolution", r"^conv_(fprop|dgrad|wgrad)\w*_kernel"),
    ("batch norm", r"^bn_\w+_kernel"),
    ("optimiser and loss", r"^sgd_(check_)?kernel"),
    (
        "layout and cast",
        r"""nchw_?(to|2)_?nhwc nhwc_?(to|2)_?nchw (nhwc|nchw)addpadding convert_?tensor tensortransform subtensorop
        batched_transpose transpose_?(kernel|readwrite|[34]d)""",
    ),
)
"""Whatever operation launched them."""

_KERNELS = _patterns(
    ("augmentation and data", r"index_elementwise vectorized_gather indexselect index_kernel"),
    (
        "layout and cast",
        r"direct_copy float\d*_copy_kernel \bcopy_kernel catarraybatchedcopy memcpy\sdtod memcpy32_post",
    ),
    ("batch norm", r"\bbn_(fw|bw) batch_?norm bnfwd bnbwd"),
    ("optimiser and loss", r"multi_tensor_apply softmax nll_loss sgd cross_entropy argmax"),
    (
        "convolution",
        r"""gemm gemv xmma cutlass nvjet fprop dgrad wgrad winograd cudnn cublas cask convolve fft2d cijk_ tensorop
        conv(olution)?([123]d|fwd|bwd|_) miopen\w*conv gridwise_conv flash fmha attn attention matmul dot_kernel splitk
        offsetskernel epilogue::impl""",
    ),
    ("memory-bound", r"elementwise reduce pool layer_?norm rms_?norm dropout distribution fill memset relu"),
)

_COMPILED_KERNELS = _patterns(
    ("convolution", r"^triton_tem_ _(add|b|badd)?mm_ _convolution_backward"),
    ("batch norm", r"batch_norm var_mean"),
    ("optimiser and loss", r"log_softmax nll_loss cross_entropy foreach fused_sgd"),
    (
        "layout and cast",
        r"^triton_[a-z]{3}_fused(_(_to_copy|_unsafe_view|clone|permute|view|convert_element_type))+(_\d+)?$",
    ),
    ("memory-bound", r"^triton_[a-z]{3}_fused"),
)
"""Those that torch.compile writes, and names after the operations in them."""


@functools.lru_cache(maxsize=1 << 14)
def _category(name: str, ops: tuple[str, ...]) -> str:
    simple = [_simplified(op) for op in ops]
    for op in simple:
        for category, pattern in _CONTEXTS:
            if pattern.match(op):
                return category
    kernel = name.lower()
    if found := _find(_OF_ONE_PURPOSE, kernel):
        return found
    for op in reversed(simple):
        for category, pattern in _OPERATIONS:
            if pattern.fullmatch(op):
                return category
    for category, pattern in _PARTS:
        if any(pattern.fullmatch(op) for op in simple):
            return category
    return _find(_COMPILED_KERNELS if kernel.startswith("triton_") else _KERNELS, kernel) or "unknown"


def _find(table: _Table, name: str) -> str | None:
    return next((category for category, pattern in table if pattern.search(name)), None)


def _simplified(op: str) -> str:
    """ "aten::max_pool2d_with_indices_backward" and "MaxPool2DWithIndicesBackward0" are one operation."""
    op = op.removeprefix("autograd::engine::evaluate_function: ").removeprefix("aten::")
    return re.sub(r"backward(data)?\d*$", "", re.sub(r"[_ .()]", "", op.lower()))
