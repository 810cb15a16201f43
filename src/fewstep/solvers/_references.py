"""Publications that more than one solver is from."""

from fewstep.core.reference import Reference

DPM_SOLVER_PP = Reference(
    "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    "Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun",
    2025,
    "Machine Intelligence Research",
    "2211.01095",
)
EXPONENTIAL = Reference(
    "Fast Sampling of Diffusion Models with Exponential Integrator",
    "Zhang, Qinsheng and Chen, Yongxin",
    2023,
    "International Conference on Learning Representations",
    "2204.13902",
)
MOMENTUM = Reference(
    "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts",
    "Wizadwongsa, Suttisak and Chinchuthakun, Worameth and Khungurn, Pramook and Raj, Amit and Suwajanakorn, Supasorn",
    2024,
    "International Conference on Learning Representations",
    "2307.11118",
)
UNIFIED = Reference(
    "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models",
    "Liu, Enshu and Ning, Xuefei and Yang, Huazhong and Wang, Yu",
    2024,
    "International Conference on Learning Representations",
    "2312.07243",
)
