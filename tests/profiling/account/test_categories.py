import ast

import pytest

from profiling import ROOT
from profiling.account.categories import AUGMENTATION, CATEGORIES, categorise
from profiling.account.trace import Kernel

NODE = "autograd::engine::evaluate_function: "
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4>"


def category(name: str, *ops: str, kind: str = "kernel") -> str:
    return categorise(Kernel(name, 0, 1, 7, 0, kind, 1, ops))


# In the order of the sweep; a kernel's name as it stands in published traces, or it and the operations around it.
KERNELS = {
    "convolution": [
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>",
        "_ZN19cutlass_cudnn_train6KernelINS_4conv6kernel23Imp",
        "void conv2d_grouped_direct_kernel<__half, __half, __half, float, float, true, false, 1, 0, 0>",
        "void wgrad2d_grouped_direct_kernel<__half, float, float, (cudnnTensorFormat_t)1>",
        "convolve_common_engine_float_NHWC<__nv_bfloat16, __nv_bfloat16, float>",
        "void cask_cudnn::computeOffsetsKernel<false, false>(cask_cudnn::ComputeOffsetsParams)",
        "void fft2d_c2r_32x32<float, false, false, 0u, false, false>",
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT",
        "void splitKreduce_kernel<32, 16, int, __half, __half>",
        "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_nn",
        "Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT256x192x64",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>",
        "triton_tem_fused_addmm_3",
        "volta_fp16_s884cudnn_fp16_256x128_ldg8_relu_f2f_exp_small_nhwc2nchw_tn_v1",
        "bmm_MxE4m3_MxE2m1MxE4m3_Fp32_t128x16x256u2_s3_et128x16_m128x16x32_cga1x1x1_16dp256b_rM_TN_transOut",
        "_ZN7ck_tile6kentryILi2ENS_38FmhaBatchPrefillWithPagedKVCacheKernelINS_40BlockFmhaBatchPrefillPipeline",
        "_ZN2ck16tensor_operation6device12_GLOBAL__N_139kernel_grouped_conv_fwd_xdl_cshuffle_v3INS_34GridwiseGemm",
        "_matmul_ogs_NNT_bf16xbf16xmxfp4_128x128x128x1_swiglu",
        "sage_fwd",
        ("mystery", f"{NODE}ConvolutionBackward0", "ConvolutionBackward0"),
        ("mystery", "aten::linear", "aten::addmm"),
        ("mystery", "cifar::conv_bn_relu", "cifar::conv_fprop"),
        ("sm90_xmma_fprop", "DistributedDataParallel.forward"),
    ],
    "batch norm": [
        "void cudnn::detail::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>",
        "void cudnn::bn_fw_inf_1C11_kernel_NHWC<__half, float>",
        "MIOpenBatchNormFwdTrainSpatial",
        "triton_red_fused__native_batch_norm_legit_functional_relu_12",
        "triton_red_fused__to_copy_var_mean_4",
        "void cudnn::compute_grad_bias_scales<float>",
        ("mystery", f"{NODE}NativeBatchNormBackward0"),
        ("mystery", "cifar::bn_relu", "cifar::bn_finalize"),
        ("mystery", "aten::_foreach_lerp_"),
    ],
    "memory-bound": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>",
        "void at::native::(anonymous namespace)::adaptive_average_pool<float>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>",
        "Memset (Device)",
        "void vllm::reshape_and_cache_flash_kernel<__hip_bfloat16, unsigned short, (vllm::Fp8KVCacheDataType)0>",
        "_finalize_matmul_scatter_bf16",
        "void split_embedding_backward_codegen_rowwise_adagrad_unweighted_kernel_cta_per_row_1<fbgemm_gpu::X, float>",
        "void fbgemm_gpu::permute_2D_data_kernel<false, long, long>(int, int, int, int const*)",
        "void bounds_check_indices_kernel<long>(fbgemm_gpu::PackedTensorAccessor<long, 1ul>)",
        "void fbgemm_gpu::_float_to_FP8rowwise_quantize_cuda_kernel<float>",
        "void (anonymous namespace)::store_kvcache<2048l, 4, false, long>((anonymous namespace)::StoreKVCacheParams)",
        "_combined_routing_compute",
        "_topk_forward",
        "void cub::DeviceRadixSortOnesweepKernel<cub::DeviceRadixSortPolicy<long, int, int>::Policy800, false>",
        "void cub::DeviceScanKernel<cub::AgentScanPolicy<128, 15, int, (cub::BlockLoadAlgorithm)3>>",
        "_ZN7sgl_hip10activation18act_and_mul_kernelI14__hip_bfloat16TnPFT_RKS3_EXadL_Z4siluIS2_ES3_S5_EEEEvPS3_PS4_i",
        "_ZN7ck_tile6kentryILi1ENS_12Rmsnorm2dFwdINS_27Rmsnorm2dFwdPipelineOnePassINS_27Rmsnorm2dFwdPipeline",
        "std::enable_if<(((8)>(0)))&&(a->b), void>::type vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(long)",
        "void cutlass::Kernel<cutlass_fused_rmsnorm>",
        "sm50_xmma_pooling_fw_4d_FP32FP32NHWC_Average_FastDiv_CAlign",
        "triton_red_fused__unsafe_view_add_addmm_mul_native_layer_norm_split_unsqueeze_19",
        (ELEMENTWISE, "aten::add_"),
        ("mystery", "aten::relu_", "aten::clamp_min_"),
        ("mystery", f"{NODE}MaxPool2DWithIndicesBackward0"),
        (
            "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float>",
            "aten::_scaled_dot_product_attention_math",
            "aten::_softmax",
        ),
        ("void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int)", "aten::gather"),
        ("linearize_index_kernel", "torch::autograd::CppNode<SplitLookupFunction_rowwise_adagrad_Op>"),
        ("mystery", "aten::_fused_rms_norm_backward"),
        ("triton_poi_fused_flash_attention_cat_10", "triton_poi_fused_flash_attention_cat_10"),
    ],
    "layout and cast": [
        "void cudnn::engines_precompiled::nhwcToNchwKernel<__nv_bfloat16, __nv_bfloat16, float>",
        "void cudnn::ops::nhwcAddPaddingKernel<__half, __half, float, true>",
        "void cudnn::ops::convertTensor_kernel<float, float, __half>",
        "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 3, 64, 64>",
        "Memcpy DtoD (Device -> Device)",
        "batched_transpose_32x32_half",
        "triton_poi_fused_clone_view_5",
        "transpose_CNHW2NCHW_V2_2D_WG_off64",
        "triton_poi_fused__to_copy_convolution_3",
        ("void cudnn::ops::nchwToNhwcKernel<__half>", "aten::conv2d", "aten::cudnn_convolution"),
        (ELEMENTWISE, "aten::convolution_backward", "aten::contiguous", "aten::copy_"),
        (
            "void at::native::elementwise_kernel<128, 2, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
            "aten::addmm",
        ),
    ],
    "optimiser and loss": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor<float, 3>>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxBackward<4, float, float, float>",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
        "triton_per_fused__log_softmax_nll_loss_forward_9",
        "triton_for_fused_0",
        (ELEMENTWISE, "Optimizer.step#SGD.step", "aten::add_"),
        (ELEMENTWISE, "Optimizer.zero_grad#SGD.zero_grad", "aten::zero_"),
        ("mystery", f"{NODE}NllLossBackward0", "NllLossBackward0"),
        ("mystery", "aten::_log_softmax_backward_data"),
        ("mystery", "aten::_foreach_norm"),
    ],
    "unknown": [
        "mystery_kernel",
        "",
        "<script>alert(1)</script>",
        "void f<gemm(",
        "_ZN99x",
        "triton__0d1d2d3d",
        ("mystery", "a convolution of mine"),
    ],
    "augmentation and data": [
        "augment_kernel",
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoH (Device -> Pageable)",
        "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int)",
        "void at::native::index_elementwise_kernel<128, 4, gpu_index_kernel>",
        (ELEMENTWISE, AUGMENTATION, "aten::copy_"),
        (ELEMENTWISE, "cifar::augment"),
        (ELEMENTWISE, "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__"),
    ],
    "communication": [
        "Memcpy PtoP (Device -> Device)",
        "void c10d::symmetric_memory::two_shot_all_reduce_kernel<c10::BFloat16, 16, 8>",
        "void vllm::cross_device_reduce_2stage<__nv_bfloat16, 8>(vllm::RankData*, vllm::RankSignals)",
        "void deep_ep::intranode::dispatch<8, 768, 8192>(int4*, float*, int*)",
        "nvshmemi_transfer_rma_signal",
        "void c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)",
        (ELEMENTWISE, "c10d::allreduce_", "aten::copy_"),
        ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t", "Optimizer.step#Shampoo.step"),
        ("void multimem_all_reduce_kernel<16>", "symm_mem::multimem_all_reduce_"),
    ],
}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(kernel, category) for category, kernels in KERNELS.items() for kernel in kernels],
    ids=lambda value: str(value)[:60],
)
def test_kernels_are_known_by_their_operations_and_names(kernel, expected):
    name, *ops = [kernel] if isinstance(kernel, str) else kernel
    assert category(name, *ops) == expected


def test_categories_are_those_of_the_account_in_the_order_of_the_sweep():
    assert tuple(KERNELS) == CATEGORIES


def test_this_projects_kernels_are_known_whatever_launches_them():
    nodes = [node for path in (ROOT / "kernels").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.decorator_list]
    found = [function.name for function in functions if function.name.endswith("_kernel")]
    assert len(found) >= 10
    wanted = {
        "augment": "augmentation and data",
        "conv": "convolution",
        "bn": "batch norm",
        "sgd": "optimiser and loss",
    }
    for name in found:
        assert category(name) == category(name, "cifar::preact_block") == wanted[name.partition("_")[0]], name


def test_without_a_device_a_name_is_an_operation_and_no_kernel():
    assert category("convolve everything", "convolve everything", kind="cpu") == "unknown"
    assert category("convolve everything") == "convolution"
