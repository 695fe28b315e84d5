import ast

import pytest
from traces import record_training

from profiling import ROOT
from profiling.account.attribution import per_step
from profiling.account.categories import AUGMENTATION, CATEGORIES, categorise
from profiling.account.trace import Kernel, read

NODE = "autograd::engine::evaluate_function: "


def category(name: str, *ops: str, kind: str = "kernel") -> str:
    return categorise(Kernel(name, 0, 1, 7, 0, kind, 1, ops))


def test_categories_are_those_of_the_account_in_the_order_of_the_sweep():
    assert CATEGORIES == (
        "convolution",
        "batch norm",
        "memory-bound",
        "layout and cast",
        "optimiser and loss",
        "unknown",
        "augmentation and data",
        "communication",
    )


# Names as they stand in published traces and profiler tables.
NAMES = {
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1",
        "sm90_xmma_dgrad_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x32_warpgroupsize1x1x1_g1_execute",
        "sm80_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc",
        "sm80_xmma_wgrad_image_first_layer_f16f16_f32_f32_nhwckrsc_nhwc",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>",
        "_ZN19cutlass_cudnn_train6KernelINS_4conv6kernel23Imp",
        "cudnn_generated_fort_native_sm80_convFwd_pointwise_pointwise_pointwise",
        "void conv2d_grouped_direct_kernel<__half, __half, __half, float, float, true, false, 1, 0, 0>",
        "void wgrad2d_grouped_direct_kernel<__half, float, float, (cudnnTensorFormat_t)1>",
        "convolve_common_engine_float_NHWC<__nv_bfloat16, __nv_bfloat16, float>",
        "cudnn_ampere_scudnn_128x64_relu_xregs_large_nn_v1",
        "volta_s884cudnn_fp16_128x128_ldg8_relu_exp_interior_nhwc_tn_v1",
        "void cask_cudnn::computeOffsetsKernel<false, false>(cask_cudnn::ComputeOffsetsParams)",
        "void fft2d_c2r_32x32<float, false, false, 0u, false, false>",
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT",
        "void splitKreduce_kernel<32, 16, int, __half, __half>",
        "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_nn",
        "Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT256x192x64",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>",
        "triton_tem_fused_addmm_3",
        "volta_fp16_s884cudnn_fp16_256x128_ldg8_relu_f2f_exp_small_nhwc2nchw_tn_v1",
        "turing_fp16_s1688cudnn_fp16_128x128_ldg8_relu_f2f_exp_small_nhwc2nchw_tn_v1",
        "bmm_MxE4m3_MxE2m1MxE4m3_Fp32_t128x16x256u2_s3_et128x16_m128x16x32_cga1x1x1_16dp256b_rM_TN_transOut",
        "bmm_Bfloat16_MxE2m1MxE4m3_Fp32_t128x16x256u2_s3_et128x16_m128x16x32_cga1x1x1_16dp256b_rM_TN_transOut",
        "_ZN7ck_tile6kentryILi2ENS_38FmhaBatchPrefillWithPagedKVCacheKernelINS_40BlockFmhaBatchPrefillPipeline",
        "_ZN2ck16tensor_operation6device12_GLOBAL__N_139kernel_grouped_conv_fwd_xdl_cshuffle_v3INS_34GridwiseGemm",
        "_matmul_ogs_NNT_bf16xbf16xmxfp4_128x128x128x1_swiglu",
        "sage_fwd",
    ],
    "batch norm": [
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, 512, true, 1>",
        "void cudnn::detail::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>",
        "void cudnn::bn_fw_inf_1C11_kernel_NHWC<__half, float>",
        "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__half, float>",
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__half, float>",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var, __half, float, 4>",
        "void at::native::batch_norm_transform_input_channels_last_kernel<__half, float, float, 4>",
        "void at::native::batch_norm_backward_reduce_channels_last_kernel<4, __half, float>",
        "MIOpenBatchNormFwdTrainSpatial",
        "triton_red_fused__native_batch_norm_legit_functional_relu_12",
        "triton_per_fused_native_batch_norm_backward_threshold_backward_7",
        "triton_red_fused__to_copy_var_mean_4",
        "void cudnn::compute_grad_bias_scales<float>",
        "triton_poi_fused_convolution_backward_native_batch_norm_backward_threshold_backward_7",
    ],
    "memory-bound": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<launch_clamp_scalar>>",
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::Half, int>",
        "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::Half, float>",
        "void at::native::(anonymous namespace)::adaptive_average_pool<float>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>",
        "Memset (Device)",
        "triton_poi_fused_relu_threshold_backward_3",
        "triton_poi_fused_0",
        "void moe::dev::finalize::finalizeKernelVecLoad<KernelParams<cutlass::bfloat16_t, cutlass::bfloat16_t, true>>",
        "void tensorrt_llm::kernels::quantize_with_block_size<(QuantizationSFLayout)0, cutlass::bfloat16_t, 32>",
        "void moe::dev::routing::routingIndicesOffsetsKernel<moe::dev::routing::KernelParams<__nv_bfloat16, 128>>",
        "void vllm::reshape_and_cache_flash_kernel<__hip_bfloat16, unsigned short, (vllm::Fp8KVCacheDataType)0>",
        "_finalize_matmul_scatter_bf16",
        "void split_embedding_backward_codegen_rowwise_adagrad_unweighted_kernel_cta_per_row_1<fbgemm_gpu::X, float>",
        "void fbgemm_gpu::permute_2D_data_kernel<false, long, long>(int, int, int, int const*)",
        "void bounds_check_indices_kernel<long>(fbgemm_gpu::PackedTensorAccessor<long, 1ul>)",
        "void fbgemm_gpu::_float_to_FP8rowwise_quantize_cuda_kernel<float>",
        "void linearize_index_kernel<long>(at::GenericPackedTensorAccessor<long, 1ul>)",
        "void at::native::_scatter_gather_elementwise_kernel<128, 4, at::native::_cuda_scatter_gather_internal_kernel>",
        "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*, c10::BFloat16*)",
        "void (anonymous namespace)::store_kvcache<2048l, 4, false, long>((anonymous namespace)::StoreKVCacheParams)",
        "_combined_routing_compute",
        "_topk_forward",
        "void cub::DeviceRadixSortOnesweepKernel<cub::DeviceRadixSortPolicy<long, int, int>::Policy800, false>",
        "void cub::DeviceScanKernel<cub::AgentScanPolicy<128, 15, int, (cub::BlockLoadAlgorithm)3>>",
        "_ZN7sgl_hip10activation18act_and_mul_kernelI14__hip_bfloat16TnPFT_RKS3_EXadL_Z4siluIS2_ES3_S5_EEEEvPS3_PS4_i",
        "_ZN5aiter24add_rmsnorm_quant_kernelIDF16bDF16bLi64ELi8ELb0ELb0ELb1ELi1EEEvPT0_PT_PfS4_S4_S4_diiiiiiib",
        "_ZN7ck_tile6kentryILi1ENS_12Rmsnorm2dFwdINS_27Rmsnorm2dFwdPipelineOnePassINS_27Rmsnorm2dFwdPipeline",
        "std::enable_if<(((8)>(0)))&&(a->b), void>::type vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(long)",
        "void cutlass::Kernel<cutlass_fused_rmsnorm>",
        "void cudnn::detail::pooling_fw_4d_kernel<float, float, cudnn::detail::maxpooling_func<float>, 0, false>",
        "sm50_xmma_pooling_fw_4d_FP32FP32NHWC_Average_FastDiv_CAlign",
        "triton_poi_fused_addmm_gelu_view_15",
        "triton_red_fused__unsafe_view_add_addmm_mul_native_layer_norm_split_unsqueeze_19",
    ],
    "layout and cast": [
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>",
        "void cudnn::engines_precompiled::nhwcToNchwKernel<__nv_bfloat16, __nv_bfloat16, float>",
        "void cudnn::ops::nhwcAddPaddingKernel<__half, __half, float, true>",
        "void cudnn::ops::convertTensor_kernel<float, float, __half>",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 3, 64, 64>",
        "Memcpy DtoD (Device -> Device)",
        "batched_transpose_32x32_half",
        "triton_poi_fused__to_copy_1",
        "triton_poi_fused_clone_view_5",
        "transpose_CNHW2NCHW_V2_2D_WG_off64",
        "triton_poi_fused_convolution_0",
        "triton_poi_fused__to_copy_convolution_3",
    ],
    "optimiser and loss": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor<float, 3>>",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 4, true, false>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxBackward<4, float, float, float>",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
        "triton_per_fused__log_softmax_nll_loss_forward_9",
        "triton_for_fused_foreach_add_2",
        "triton_for_fused_0",
    ],
    "augmentation and data": [
        "augment_kernel",
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoH (Device -> Pageable)",
        "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int)",
        "void at::native::index_elementwise_kernel<128, 4, gpu_index_kernel>",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "Memcpy PtoP (Device -> Device)",
        "void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*, unsigned long)",
        "void c10d::symmetric_memory::two_shot_all_reduce_kernel<c10::BFloat16, 16, 8>",
        "void vllm::cross_device_reduce_2stage<__nv_bfloat16, 8>(vllm::RankData*, vllm::RankSignals)",
        "void deep_ep::intranode::dispatch<8, 768, 8192>(int4*, float*, int*)",
        "nvshmemi_transfer_rma_signal",
        "void c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)",
    ],
    "unknown": ["mystery_kernel", "", "<script>alert(1)</script>", "void f<gemm(", "_ZN99x", "triton__0d1d2d3d"],
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [(name, category) for category, names in NAMES.items() for name in names],
    ids=lambda v: v[:60],
)
def test_kernels_are_known_by_name(name, expected):
    assert category(name) == expected


def kernels_of_this_project() -> list[str]:
    found = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                found.append(node.name)
    return found


def test_this_projects_kernels_are_known_whatever_launches_them():
    found = kernels_of_this_project()
    assert len(found) >= 10
    wanted = {
        "augment": "augmentation and data",
        "conv": "convolution",
        "bn": "batch norm",
        "sgd": "optimiser and loss",
    }
    for name in found:
        assert category(name) == wanted[name.partition("_")[0]], name
        assert category(name, "cifar::preact_block") == category(name), name


ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4>"
S884 = "volta_fp16_s884cudnn_fp16_256x128_ldg8_relu_f2f_exp_small_nhwc2nchw_tn_v1"
SOFTMAX = "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float>"
GATHER = "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int)"
COPY = "void at::native::elementwise_kernel<128, 2, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>"
TRANSPOSE = "void cudnn::ops::nchwToNhwcKernel<__half>"


@pytest.mark.parametrize(
    ("name", "ops", "expected"),
    [
        ("mystery", ["aten::conv2d", "aten::convolution", "aten::cudnn_convolution"], "convolution"),
        ("mystery", [f"{NODE}ConvolutionBackward0", "ConvolutionBackward0"], "convolution"),
        ("mystery", ["aten::linear", "aten::addmm"], "convolution"),
        ("mystery", ["cifar::conv_bn_relu", "cifar::conv_fprop"], "convolution"),
        ("Memset (Device)", ["aten::convolution_backward"], "convolution"),
        (TRANSPOSE, ["aten::conv2d", "aten::cudnn_convolution"], "layout and cast"),
        (ELEMENTWISE, ["aten::convolution_backward", "aten::contiguous", "aten::copy_"], "layout and cast"),
        (ELEMENTWISE, ["aten::convolution_backward", "aten::sum"], "convolution"),
        ("mystery", ["aten::batch_norm", "aten::_batch_norm_impl_index", "aten::cudnn_batch_norm"], "batch norm"),
        ("mystery", [f"{NODE}NativeBatchNormBackward0"], "batch norm"),
        ("mystery", ["aten::miopen_batch_norm_backward"], "batch norm"),
        ("mystery", ["cifar::bn_relu", "cifar::bn_finalize"], "batch norm"),
        (ELEMENTWISE, ["aten::native_batch_norm", "aten::mul"], "batch norm"),
        (ELEMENTWISE, ["aten::add_"], "memory-bound"),
        ("mystery", ["aten::relu_", "aten::clamp_min_"], "memory-bound"),
        ("mystery", [f"{NODE}MaxPool2DWithIndicesBackward0"], "memory-bound"),
        ("mystery", ["cifar::conv_bn_relu", "aten::max_pool2d_with_indices"], "memory-bound"),
        (ELEMENTWISE, ["aten::to", "aten::_to_copy", "aten::copy_"], "layout and cast"),
        (ELEMENTWISE, ["Optimizer.step#SGD.step", "aten::add_"], "optimiser and loss"),
        (ELEMENTWISE, ["Optimizer.zero_grad#SGD.zero_grad", "aten::zero_"], "optimiser and loss"),
        (ELEMENTWISE, ["aten::cross_entropy_loss", "aten::mul"], "optimiser and loss"),
        ("mystery", [f"{NODE}NllLossBackward0", "NllLossBackward0"], "optimiser and loss"),
        ("mystery", ["aten::_log_softmax_backward_data"], "optimiser and loss"),
        ("mystery", ["aten::_foreach_norm"], "optimiser and loss"),
        ("mystery", ["aten::_foreach_lerp_"], "batch norm"),  # of the running statistics
        (ELEMENTWISE, [AUGMENTATION, "aten::copy_"], "augmentation and data"),
        (ELEMENTWISE, ["cifar::augment"], "augmentation and data"),
        ("Memcpy HtoD (Pinned -> Device)", ["aten::to", "aten::copy_"], "augmentation and data"),
        (ELEMENTWISE, ["enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__"], "augmentation and data"),
        (ELEMENTWISE, ["c10d::allreduce_", "aten::copy_"], "communication"),
        ("ncclDevKernel_AllReduce", ["nccl:all_reduce"], "communication"),
        ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t", ["Optimizer.step#Shampoo.step"], "communication"),
        ("void multimem_all_reduce_kernel<16>", ["symm_mem::multimem_all_reduce_"], "communication"),
        (S884, ["aten::conv2d", "aten::cudnn_convolution"], "convolution"),
        (SOFTMAX, ["aten::_scaled_dot_product_attention_math", "aten::_softmax"], "memory-bound"),
        (SOFTMAX, ["aten::cross_entropy_loss", "aten::_softmax"], "optimiser and loss"),
        (ELEMENTWISE, ["aten::mse_loss"], "optimiser and loss"),
        (GATHER, ["aten::gather"], "memory-bound"),
        (
            "linearize_index_kernel",
            ["torch::autograd::CppNode<SplitLookupFunction_rowwise_adagrad_Op>"],
            "memory-bound",
        ),
        ("mystery", ["aten::_fused_rms_norm_backward"], "memory-bound"),
        ("triton_poi_fused_flash_attention_cat_10", ["triton_poi_fused_flash_attention_cat_10"], "memory-bound"),
        (COPY, ["aten::addmm"], "layout and cast"),
        ("sm90_xmma_fprop", ["DistributedDataParallel.forward"], "convolution"),
        ("triton_poi_fused_add_relu_1", ["CompiledFunction", "triton_poi_fused_add_relu_1"], "memory-bound"),
        ("mystery", ["a convolution of mine"], "unknown"),
        ("mystery", ["aten::resolve_conj"], "unknown"),
        ("mystery", ["aten::convert_element_type_of_mine"], "unknown"),
    ],
)
def test_operations_decide_where_they_can(name, ops, expected):
    assert category(name, *ops) == expected


def test_without_a_device_a_name_is_an_operation_and_no_kernel():
    assert category("convolve everything", "convolve everything", kind="cpu") == "unknown"
    assert category("convolve everything") == "convolution"


SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in (("resnet", "float32"), ("resnet9", "bfloat16"))]


@pytest.mark.parametrize(("network", "dtype"), [("resnet", "bfloat16"), ("resnet9", "float32"), *SLOW])
def test_little_of_a_recorded_training_step_is_unknown(tmp_path, network, dtype):
    found = per_step(read(record_training(tmp_path / "trace.json", network, dtype)))
    assert found.steps == 2
    found = found.total
    assert found.by_category["unknown"] < 0.05 * found.busy_ns
    for name in ("convolution", "batch norm", "memory-bound", "layout and cast", "optimiser and loss"):
        assert found.by_category[name] > 0, name
    assert found.by_category["augmentation and data"] > 0
    assert found.by_category["communication"] == 0
