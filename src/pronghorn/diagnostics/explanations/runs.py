"""PH5xx, PH6xx and PH7xx: hardware and memory, saving and export, training runs."""

from __future__ import annotations

from pronghorn.diagnostics.explanations.parts import Explanation

EXPLANATIONS: dict[str, Explanation] = {
    "PH501": Explanation(
        cause="Weights, optimizer states and what the layers keep for backward exceed what is free. The "
        "message compares what was planned for the largest batch with what was there: another process "
        "on the GPU shows as less free.",
        fix="In this order: memory_budget='auto' (layers keep what fits), "
        "use_gradient_checkpointing='offload', load_in_4bit, a smaller per_device_train_batch_size "
        "with more gradient_accumulation_steps, a smaller max_length. `pronghorn plan MODEL` tells "
        "beforehand; nvidia-smi shows who else is on the GPU.",
        example="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 23.64 GiB of which 1.12 GiB is free.",
        zh=(
            "GPU 显存不足以完成一个训练步。",
            "权重、优化器状态和各层为反向保存的内容超过了可用显存。报错比较最大批次的计划用量与实际可用"
            "量：GPU 上的其他进程会使可用量变少。",
            "依次尝试：memory_budget='auto'（各层只保存放得下的内容）、"
            "use_gradient_checkpointing='offload'、load_in_4bit、减小 per_device_train_batch_size 并增"
            "大 gradient_accumulation_steps、减小 max_length。`pronghorn plan MODEL` 可事先估算；"
            "nvidia-smi 显示谁在使用 GPU。",
        ),
    ),
    "PH502": Explanation(
        cause="Even with every layer keeping nothing, weights and one layer's work exceed memory_budget.",
        fix="Take the change the message names: a larger budget, shorter rows, fewer rows a batch, or "
        "4-bit weights.",
        example="[PH502] a batch of 8,192 tokens needs 13.1 GiB at least, and the budget is 12.0 GiB. Fix: "
        "max_length=6144, or a budget of 13.1GiB",
        zh=(
            "无论各层保存多少，训练步都放不进显存预算。",
            "即使各层什么都不保存，权重和单层计算也超过 memory_budget。",
            "按提示修改：增大预算、缩短行、减少每批行数或使用 4 位权重。",
        ),
    ),
    "PH503": Explanation(
        cause="The budget is no size, or 'auto' was asked where there is no GPU.",
        fix="Give bytes or a text such as 17.5GiB.",
        example="[PH503] '24 gigs' is no size. Fix: give such as 24GiB",
        zh=(
            "显存预算不是有效大小，或要求的 GPU 不存在。",
            "预算写法无效，或在没有 GPU 的机器上使用了 'auto'。",
            "写成字节数或类似 17.5GiB 的文本。",
        ),
    ),
    "PH504": Explanation(
        cause="The name is none of cudnn, flash, flex, cpu, sdpa, eager, or that implementation cannot do "
        "this model's head size, dtype or mask on this device.",
        fix="Leave attention out: the fastest one that can is taken. `pronghorn doctor` shows which work "
        "here.",
        example="[PH504] attention 'flash' was asked for, but it runs on CUDA GPUs, not on cpu. Fix: 'cpu', or "
        "leave the choice open",
        zh=(
            "指定的注意力实现不存在，或在该设备上不支持此模型。",
            "名称不是 cudnn、flash、flex、cpu、sdpa、eager 之一，或该实现不支持此模型的头大小、类型或掩码。",
            "不写 attention：会选择可用的最快实现。`pronghorn doctor` 显示本机哪些可用。",
        ),
    ),
    "PH505": Explanation(
        cause="Matrix units multiply e4m3 from compute capability 8.9 on (Ada, Hopper, Blackwell).",
        fix="Leave load_in_fp8 out; load_in_4bit saves more memory on older GPUs.",
        example="[PH505] fp8 was asked for, and compute capability 8.0 does not multiply e4m3. Fix: leave out "
        "load_in_fp8",
        zh=(
            "要求 fp8 乘法，但 GPU 的矩阵单元不支持 e4m3。",
            "计算能力 8.9 起（Ada、Hopper、Blackwell）才支持 e4m3 矩阵乘法。",
            "去掉 load_in_fp8；在较旧的 GPU 上 load_in_4bit 更省显存。",
        ),
    ),
    "PH506": Explanation(
        cause="A compiled part was made for another version of a part it works with. `invalid configuration "
        "argument` and `undefined symbol` are the usual signs: torch updated without Triton, "
        "bitsandbytes or flash-attn, or a driver older than the CUDA that torch was built with.",
        fix="`pronghorn doctor --fix-hints` names the pair. Usually: pip install -U torch triton "
        "bitsandbytes together, or the driver.",
        example="RuntimeError: CUDA error: invalid configuration argument",
        zh=(
            "驱动、CUDA、torch、Triton 或其他编译包互不匹配。",
            "某个编译部分是为另一版本制作的。常见迹象是 `invalid configuration argument` 和 `undefined "
            "symbol`：更新了 torch 而没有更新 Triton、bitsandbytes 或 flash-attn，或驱动比 torch 所用的"
            " CUDA 旧。",
            "`pronghorn doctor --fix-hints` 会指出是哪一对。通常：一起 pip install -U torch triton "
            "bitsandbytes，或更新驱动。",
        ),
    ),
    "PH507": Explanation(
        cause="The installed torch holds code for some GPU generations only: new ones need a new torch, very "
        "old ones an old one.",
        fix="Install a torch built for this GPU (https://pytorch.org/get-started/locally); the doctor's "
        "line 'GPU architecture' shows what the present one has.",
        example="RuntimeError: CUDA error: no kernel image is available for execution on the device",
        zh=(
            "已安装的 torch 或 Triton 没有该 GPU 的代码。",
            "已安装的 torch 只含部分 GPU 代次的代码：新 GPU 需要新 torch，很旧的 GPU 需要旧 torch。",
            "安装支持该 GPU 的 torch（https://pytorch.org/get-started/locally）；doctor 的 'GPU "
            "architecture' 一行显示现有支持。",
        ),
    ),
    "PH508": Explanation(
        cause="A kernel read or wrote outside of its memory, most often for a token id or label that does "
        "not exist (device-side assert); more rarely a fault of the card, its memory or its power "
        "supply.",
        fix="Run one step with the model on the CPU, or with CUDA_LAUNCH_BLOCKING=1, which names the "
        "place; then `pronghorn doctor`. `nvidia-smi -q -d ECC` and the system's log (Xid) show faults "
        "of the card.",
        example="RuntimeError: CUDA error: an illegal memory access was encountered",
        zh=(
            "GPU 上的核函数出错，本进程无法再使用该 GPU。",
            "核函数读写越界，多因标记编号或标签不存在（device-side assert）；少数是显卡、显存或供电故障。",
            "把模型放到 CPU 上运行一步，或用 CUDA_LAUNCH_BLOCKING=1 定位，然后运行 `pronghorn doctor`。"
            "`nvidia-smi -q -d ECC` 和系统日志（Xid）显示硬件故障。",
        ),
    ),
    "PH509": Explanation(
        cause="Matrix units multiply int8 from compute capability 7.5 on (Turing and all later ones).",
        fix="Leave load_in_int8 out; load_in_4bit works on older GPUs.",
        example="[PH509] int8 was asked for, and compute capability 7.0 does not multiply int8. Fix: leave out "
        "load_in_int8",
        zh=(
            "要求 int8 乘法，但 GPU 的矩阵单元不支持 int8。",
            "计算能力 7.5 起（Turing 及之后）才支持 int8 矩阵乘法。",
            "去掉 load_in_int8；较旧的 GPU 可用 load_in_4bit。",
        ),
    ),
    "PH601": Explanation(
        cause="The disk is full, the folder belongs to somebody else, or a weight cannot be merged. Nothing "
        "half-written is left.",
        fix="Free some space or name another folder; training goes on from the last complete checkpoint "
        "with --resume.",
        example="[PH601] checkpoint-500 could not be written: the disk is full (outputs). Fix: free some space",
        zh=(
            "写入模型失败：磁盘已满、文件夹不可写或某个权重无法合并。",
            "磁盘已满、文件夹属于他人，或某个权重无法合并。不会留下写了一半的文件。",
            "释放空间或换一个文件夹；用 --resume 从最后一个完整检查点继续。",
        ),
    ),
    "PH602": Explanation(
        cause="What was read back after writing is not what was meant: a failing disk or network drive, or "
        "two processes writing to one folder.",
        fix="Save again, to another disk if it stays so. What was there before is still there.",
        example="[PH602] model.safetensors cannot be read back: incomplete metadata. Fix: save again",
        zh=(
            "模型已写入，但磁盘上的内容与预期不同；原有内容没有被替换。",
            "写入后读回的内容不符：磁盘或网络盘故障，或两个进程写同一个文件夹。",
            "重新保存；若仍如此换一块磁盘。原来的内容仍在。",
        ),
    ),
    "PH603": Explanation(
        cause="The output folder holds no checkpoint-N, or its writing was interrupted.",
        fix="Train without resuming, or name the folder that has checkpoint-N in it.",
        example="[PH603] there is no complete checkpoint to resume from (outputs). Fix: train without resuming",
        zh=(
            "无法恢复训练：没有完整的检查点。",
            "输出文件夹中没有 checkpoint-N，或其写入被中断。",
            "不恢复而重新训练，或指定含有 checkpoint-N 的文件夹。",
        ),
    ),
    "PH604": Explanation(
        cause="Rank, target modules, optimizer or the set of trained weights changed since the checkpoint "
        "was written.",
        fix="Put the settings back to those of the run (adapter_config.json in the checkpoint has them), "
        "or begin a new run in another output folder.",
        example="ValueError: loaded state dict contains a parameter group that doesn't match the size of "
        "optimizer's group",
        zh=(
            "检查点来自另一次训练：适配器、优化器或权重数量与现在不同。",
            "写入检查点之后改变了秩、目标模块、优化器或参与训练的权重。",
            "恢复原来的设置（检查点中的 adapter_config.json），或在另一个输出文件夹开始新的训练。",
        ),
    ),
    "PH605": Explanation(
        cause="GGUF is read by llama.cpp, which computes a fixed set of families and tokenizers. What it would compute "
        "otherwise than the model was trained is refused.",
        fix="Save a stock checkpoint with save_pretrained_merged (pronghorn export --to merged_16bit); nothing is lost "
        "there.",
        example="[PH605] models of the type 'gpt2' cannot be written as GGUF. Fix: save_pretrained_merged, then "
        "llama.cpp's own converter",
        zh=(
            "模型、其 RoPE 或词表无法写成所要求的格式；没有写入任何文件。",
            "GGUF 由 llama.cpp 读取，它只支持一部分模型系列和分词器。会与训练时计算不同的内容一律拒绝导出。",
            "用 save_pretrained_merged（pronghorn export --to merged_16bit）保存标准检查点，不会有任何损失。",
        ),
    ),
    "PH606": Explanation(
        cause="There is no token, the token may not write to this repository, or the connection broke off. The files "
        "are complete in the folder that the message names.",
        fix="Log in with `hf auth login` using a token with the right to write (or pass token=...); after a broken "
        "connection, send the folder with the command in the message: parts that arrived are not sent again.",
        example="[PH606] the upload to me/my-model broke off (upload-k2j3/my-model). Fix: everything is in that "
        "folder; go on with `hf upload me/my-model upload-k2j3/my-model`",
        zh=(
            "上传到 hub 失败：没有令牌、令牌没有写权限，或网络中断；本地文件没有丢失。",
            "没有令牌，令牌无权写入该仓库，或连接中断。消息中指出的文件夹里有全部文件。",
            "用具有写权限的令牌执行 `hf auth login`（或传入 token=...）；连接中断后，用消息中的命令继续上传该文件夹，"
            "已到达的部分不会重传。",
        ),
    ),
    "PH611": Explanation(
        cause="The format keeps too few bits for this model, or tensors, RoPE or tokenizer were written wrongly. The "
        "message names the reader, the divergence and what was allowed.",
        fix="Take a format with more bits (q8_0); if f16 or bf16 fails too, report it with the file ending in "
        ".failed.txt.",
        example="[PH611] my-model.Q2_K.gguf differs from the model: llama.cpp: KL 3.71 nats, at most 3 expected. Fix: "
        "use q8_0",
        zh=(
            "导出的文件由实际运行它的程序重新打开后，预测与模型不同；文件保留并做了标记。",
            "该格式的位数对这个模型太少，或张量、RoPE、分词器写错了。消息中说明读取程序、KL 散度和允许的上限。",
            "换用位数更多的格式（q8_0）；若 f16 或 bf16 也失败，请附上以 .failed.txt 结尾的文件报告。",
        ),
    ),
    "PH701": Explanation(
        cause="A weight of the checkpoint is NaN already; numbers leave the range of float16 (65,504); the "
        "learning rate is too high; or a row makes a division by zero. The message names the first "
        "tensor, its layer, the row and the token, from the batch run again layer by layer.",
        fix="Non-finite weights: load the checkpoint again, or go back to one before. Overflow in float16: "
        "bfloat16. Otherwise halve learning_rate, add warmup_steps, keep max_grad_norm at 1, and look "
        "at the row.",
        example="[PH701] the loss is nan at step 12: model.layers.3.mlp.up_proj.weight holds 1 value that is "
        "no number. Fix: load the checkpoint again",
        zh=(
            "损失或梯度为 NaN 或无穷；会指出最先出现的张量、层、数据行和标记。",
            "检查点中的权重已是 NaN；数值超出 float16 范围（65504）；学习率过高；或某一行导致除以零。报"
            "错中的位置来自逐层重新运行该批次。",
            "权重异常：重新载入检查点，或回到更早的一个。float16 溢出：改用 bfloat16。否则把 "
            "learning_rate 减半、增加 warmup_steps、保持 max_grad_norm 为 1，并查看该行数据。",
        ),
    ),
    "PH702": Explanation(
        cause="One process ended with an error of its own (look at the first one in the log), ran out of "
        "memory, waited for data, or the processes trained different layers.",
        fix="Read the first error of all processes, not the last. `pronghorn doctor` on each machine "
        "checks copies between GPUs; NCCL_DEBUG=INFO tells the links; a longer ddp_timeout helps where "
        "one process prepares data for long.",
        example="torch.distributed.DistBackendError: NCCL error: unhandled system error",
        zh=(
            "分布式训练的进程彼此失去联系：有进程退出、卡住或集合通信不一致。",
            "某个进程自己出错退出（看日志中最早的错误）、显存不足、等待数据，或各进程训练的层不同。",
            "查看所有进程中最早的错误，而不是最后一个。在每台机器上运行 `pronghorn doctor` 检查 GPU 间"
            "拷贝；NCCL_DEBUG=INFO 显示链路；准备数据时间长时增大 ddp_timeout。",
        ),
    ),
    "PH703": Explanation(
        cause="The folder is not the output_dir of a run, the run ended before its first log, its report was turned "
        "off (report=False) and it saved no checkpoint, or the file was cut off.",
        fix="Name the output_dir of the run, its run.json, or a checkpoint's trainer_state.json, of whichever trainer.",
        example="[PH703] there is neither run.json nor trainer_state.json (outputs). Fix: name the output_dir of a run",
        zh=(
            "该文件夹或文件中没有训练运行的记录，或记录已损坏。",
            "该文件夹不是某次运行的 output_dir；运行在第一次记录日志前就结束了；关闭了报告（report=False）"
            "且没有保存检查点；或文件不完整。",
            "请指定该运行的 output_dir、其中的 run.json，或任意训练器检查点中的 trainer_state.json。",
        ),
    ),
    "PH704": Explanation(
        cause="A learning-rate test or a scan trains for a few steps and puts everything back. It cannot do so from "
        "inside a training, or for a trainer whose model_init makes another model each time.",
        fix="Call it before trainer.train(), or after it; give the trainer a model.",
        example="[PH704] this trainer is training now. Fix: ask before trainer.train(), or after it",
        zh=(
            "该训练器无法借给短训练使用。",
            "学习率测试或扫描会训练若干步再恢复一切；训练进行中，或每次由 model_init 新建模型的训练器无法这样做。",
            "请在 trainer.train() 之前或之后调用；直接给训练器一个模型。",
        ),
    ),
    "PH705": Explanation(
        cause="The loss of no batch fell at any rate: nothing is trained (all parameters frozen), the labels are the "
        "same everywhere or random, or the highest rate of the test is too low.",
        fix="`pronghorn data check` on the rows; trainer.model.print_trainable_parameters(); a higher --highest.",
        example="[PH705] at no rate from 1e-06 to 1 the loss fell. Fix: check the rows and what is trained",
        zh=(
            "测试的所有学习率下损失都没有下降。",
            "没有可训练的参数、各处标签相同或随机，或测试的最高学习率过低。",
            "对数据运行 `pronghorn data check`；查看 trainer.model.print_trainable_parameters()；提高 --highest。",
        ),
    ),
    "PH706": Explanation(
        cause="`--vary` names a setting that a search does not vary, a value that it cannot have (a rate of 0, a rank "
        "of 0, half a row), an empty range, or a micro-batch of more rows than there are; or several workers do not "
        "fit into the memory of one GPU by the plan.",
        fix="Give values that the message asks for; fewer `--workers`.",
        example="[PH706] 'r' cannot be 0. Fix: give a whole number from 1",
        zh=(
            "无法按所给的设置进行搜索。",
            "`--vary` 指定了不能搜索的设置、不可能的取值（学习率为 0、秩为 0、非整数行数）、空范围，或微批次行数"
            "多于数据行数；或按内存计划，一块 GPU 容纳不下这么多进程。",
            "按提示给出取值；减少 `--workers`。",
        ),
    ),
    "PH707": Explanation(
        cause="A search goes on after the trials in its folder (`trials.jsonl`) only if the space, the base model's "
        "weights, the rows and the other settings are the same: otherwise scores could not be compared.",
        fix="Go on with the same, name another output.folder, or begin anew with --restart.",
        example='[PH707] the trials so far are of another space: {"r": [4]}, now {"r": [8]} (trials.jsonl). Fix: go '
        "on with the same",
        zh=(
            "文件夹中已有的试验属于另一个搜索空间、模型、数据或设置。",
            "只有搜索空间、基础模型权重、数据行和其他设置都相同，搜索才会接着 `trials.jsonl` 中的试验继续，否则得分"
            "无法比较。",
            "使用相同的设置继续；换一个 output.folder；或用 --restart 重新开始。",
        ),
    ),
    "PH708": Explanation(
        cause="Every setting ran out of memory or diverged, the metric function raised an error of its own or "
        "merged the adapter into the base, or a worker process ended before it had loaded the base.",
        fix="Look at the reasons in the table: lower rates, smaller micro-batches. Try the metric on the model alone.",
        example="[PH708] none of 6 trials finished: the loss is nan at step 2. Fix: search lower rates",
        zh=(
            "搜索没有任何完成的试验，或评分函数出错，或工作进程无法启动。",
            "所有设置都内存不足或发散；评分函数自身抛出错误，或把适配器合并进了基础模型；或工作进程在加载基础模型之前就结束了。",
            "查看表中的原因：降低学习率、减小微批次。单独在模型上试运行评分函数。",
        ),
    ),
}
