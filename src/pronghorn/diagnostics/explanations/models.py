"""PH1xx and PH2xx: checkpoints and models, adapters and the engine."""

from __future__ import annotations

from pronghorn.diagnostics.explanations.parts import Explanation

EXPLANATIONS: dict[str, Explanation] = {
    "PH101": Explanation(
        cause="The name is no existing folder or file, and the hub has no repository of it, or none that you "
        "may see.",
        fix="Check the spelling; a relative path starts at the folder the command runs in. For the hub "
        "give OWNER/NAME.",
        example="[PH101] there is no model at './modles/qwen'. Fix: did you mean './models/qwen'?",
        zh=(
            "找不到模型的文件夹、hub 名称或文件。",
            "该名称既不是已有的文件夹或文件，hub 上也没有这个仓库，或者你无权查看。",
            "检查拼写；相对路径从运行命令的文件夹算起。hub 模型请写 OWNER/NAME。",
        ),
    ),
    "PH102": Explanation(
        cause="A download or a copy was interrupted, the disk filled up while saving, or files of two models "
        "were mixed.",
        fix="Delete the file that is named and download or save it again; compare its size with the "
        "original's.",
        example="[PH102] model-00002-of-00004.safetensors is cut short: 1,203 bytes where its header promises "
        "4,915,916,176 (/models/llama). Fix: download it again",
        zh=(
            "检查点存在但无法读取：被截断、格式不对、缺少分片或键。",
            "下载或复制中断、保存时磁盘已满，或混入了另一个模型的文件。",
            "删除报错中指出的文件，重新下载或保存；与原文件比较大小。",
        ),
    ),
    "PH103": Explanation(
        cause="Pickle files (.bin, .pt) and a repository's own Python code can run anything on your machine, "
        "and unknown quantisations cannot be trained on.",
        fix="Take a repository with safetensors files, or convert it once in a sandbox. "
        "trust_remote_code=True runs the repository's code: read it first.",
        example="[PH103] the folder has only pickle weights (pytorch_model.bin) (/models/old). Fix: convert "
        "them to safetensors",
        zh=(
            "检查点可读但被拒绝：pickle 权重、远程代码或未知的量化方式。",
            "pickle 文件（.bin、.pt）和仓库自带的 Python 代码可以在你的机器上执行任何操作；未知的量化无"
            "法训练。",
            "使用带 safetensors 的仓库，或在沙箱中转换一次。trust_remote_code=True 会运行仓库代码，请先"
            "阅读。",
        ),
    ),
    "PH104": Explanation(
        cause="Only the weights were copied, or the model was saved without its tokenizer, or it is a base "
        "model whose tokenizer has no chat template.",
        fix="Copy tokenizer.json, tokenizer_config.json and special_tokens_map.json of the original model "
        "into the folder. For a missing template: get_chat_template(tokenizer, 'chatml') or rows of "
        "plain text.",
        example="[PH104] the folder has no tokenizer (no tokenizer.json, tokenizer.model or vocab.json) "
        "(/models/mine). Fix: copy the tokenizer files of the original model into it",
        zh=(
            "缺少分词器，或分词器缺少所需内容（聊天模板、EOS 标记）。",
            "只复制了权重，或保存模型时没有保存分词器，或者是没有聊天模板的基础模型。",
            "把原模型的 tokenizer.json、tokenizer_config.json 和 special_tokens_map.json 复制到该文件夹"
            "。缺少模板时使用 get_chat_template(tokenizer, 'chatml')，或改用纯文本数据。",
        ),
    ),
    "PH105": Explanation(
        cause="config.json belongs to another model; the head is tied to the embedding and was left out of "
        "the files (`lm_head.weight`); or tokens were added to the tokenizer and the embedding was not "
        "resized.",
        fix="Use the config.json that came with the weights. For `lm_head.weight`: set tie_word_embeddings "
        "to true if the model ties them, else get the file again. After adding tokens: "
        "model.resize_token_embeddings(len(tokenizer)).",
        example="RuntimeError: Error(s) in loading state_dict for Linear: size mismatch for lm_head.weight: "
        "copying a param with shape torch.Size([32001, 4096]) from checkpoint, the shape in current "
        "model is [32000, 4096]",
        zh=(
            "检查点与要载入的模型不一致：缺少权重（`lm_head.weight`）或尺寸不同。",
            "config.json 属于另一个模型；输出头与词嵌入共享而没有写入文件（`lm_head.weight`）；或者给分"
            "词器添加了标记却没有调整词嵌入大小。",
            "使用与权重配套的 config.json。缺少 `lm_head.weight`：若模型共享词嵌入，把 "
            "tie_word_embeddings 设为 true，否则重新获取文件。添加标记后调用 "
            "model.resize_token_embeddings(len(tokenizer))。",
        ),
    ),
    "PH106": Explanation(
        cause="Makers of some models (Llama, Gemma, …) ask you to accept terms on the hub first.",
        fix="Open the model's page, accept its terms, then `hf auth login` on this machine, or pass "
        "token=... An approved copy in a local folder works without.",
        example="OSError: You are trying to access a gated repo. Make sure to have access to it at "
        "https://huggingface.co/meta-llama/Llama-3.1-8B",
        zh=(
            "hub 只把该模型提供给接受条款并已登录的用户。",
            "一些模型（Llama、Gemma 等）的发布者要求先在 hub 上接受条款。",
            "打开模型页面并接受条款，然后在本机运行 `hf auth login` 或传入 token=...；本地文件夹中的副"
            "本不需要这一步。",
        ),
    ),
    "PH108": Explanation(
        cause="The adapter was trained on a model of another family or size: its weights have no modules to go to, or "
        "other shapes than these have. base_model_name_or_path in adapter_config.json may name a folder whose model "
        "has changed since.",
        fix="Load it on the model it was trained on; base_model_name_or_path names that. Train a new adapter for "
        "another model.",
        example="[PH108] the adapter was made for another model: 20 of its weights have no place in this phi3 model, "
        "first model.layers.0.mlp.gate_proj.lora_A.weight. Fix: load it on the model that base_model_name_or_path in "
        "adapter_config.json named when it was trained",
        zh=(
            "适配器是为另一个模型训练的：模块名称或尺寸与当前模型不符。",
            "适配器在另一系列或另一尺寸的模型上训练，其权重在当前模型中没有对应的模块，或形状不同；也可能 "
            "adapter_config.json 中 base_model_name_or_path 指向的文件夹里的模型后来换过。",
            "把它加载到训练时所用的模型上（见 base_model_name_or_path）；换模型则重新训练适配器。",
        ),
    ),
    "PH107": Explanation(
        cause="There is no network, a proxy or firewall is in between, or HF_HUB_OFFLINE is set.",
        fix="Give a local folder, or download on another machine (`hf download NAME`) and copy it. Unset "
        "HF_HUB_OFFLINE where it was set by mistake; a mirror is chosen with HF_ENDPOINT.",
        example="ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded",
        zh=(
            "hub 没有响应，或本进程被设为离线。",
            "没有网络、中间有代理或防火墙，或设置了 HF_HUB_OFFLINE。",
            "使用本地文件夹，或在另一台机器上用 `hf download NAME` 下载后复制过来。误设的 "
            "HF_HUB_OFFLINE 请取消；镜像用 HF_ENDPOINT 指定。",
        ),
    ),
    "PH201": Explanation(
        cause="Names of layers differ between families: `c_attn` is GPT-2's, `q_proj` Llama's.",
        fix="Leave target_modules out (all linear layers), or take names that `print(model)` shows.",
        example="[PH201] the model has no module 'query_proj'. Fix: did you mean 'q_proj'?",
        zh=(
            "`target_modules` 或 `modules_to_save` 指定了模型中不存在的模块。",
            "各模型族的层名不同：`c_attn` 属于 GPT-2，`q_proj` 属于 Llama。",
            "不写 target_modules（即所有线性层），或使用 `print(model)` 显示的名称。",
        ),
    ),
    "PH202": Explanation(
        cause="The model's type has no family file, or something in it (an activation, attention dropout, a "
        "replaced module) is not what the fast path computes.",
        fix="Leave strict out: the model trains on Transformers' own forward, and the reason is told once.",
        example="[PH202] GPT2LMHeadModel cannot take the fast path: model type 'gpt2' has no family file. Fix: "
        "load with strict=False to train on the stock forward",
        zh=(
            "设置了 `strict=True`，而模型有一部分不能走快速路径。",
            "该模型类型没有族文件，或其中某处（激活函数、注意力 dropout、被替换的模块）不是快速路径所计"
            "算的。",
            "去掉 strict：模型会用 Transformers 自己的前向训练，原因会提示一次。",
        ),
    ),
    "PH203": Explanation(
        cause="retain_graph=True and a second backward: layers let go of what they kept as soon as it is "
        "used.",
        fix="Run the forward again, or take the fast path off with binding_of(model).undo().",
        example="[PH203] backward ran twice through one forward of a decoder layer, whose kept activations the "
        "first used up. Fix: run the forward again",
        zh=(
            "对同一次前向做了第二次反向；保存的激活已被第一次用掉。",
            "使用了 retain_graph=True 并再次反向：各层用完保存的内容后立即释放。",
            "重新运行前向，或用 binding_of(model).undo() 关闭快速路径。",
        ),
    ),
    "PH204": Explanation(
        cause="A misspelt level, or a list that is not as long as the model has layers.",
        fix="One of offload, none, offload-attention, attention, offload-matmuls, matmuls, all; or a list, "
        "one a layer.",
        example="[PH204] 'atention' is not a save level. Fix: did you mean 'attention'?",
        zh=(
            "不存在的保存级别，或级别列表长度不对。",
            "级别拼写错误，或列表长度与模型层数不同。",
            "使用 offload、none、offload-attention、attention、offload-matmuls、matmuls、all 之一；或每"
            "层一个的列表。",
        ),
    ),
    "PH205": Explanation(
        cause="get_peft_model was called twice, or settings exclude each other.",
        fix="Load the model again, or go on with the adapter it has.",
        example="[PH205] the model has an adapter already. Fix: train that one, or load the base model again",
        zh=(
            "无法给该模型加适配器：已经有一个，或组合没有意义。",
            "调用了两次 get_peft_model，或设置互相冲突。",
            "重新载入模型，或继续使用已有的适配器。",
        ),
    ),
    "PH206": Explanation(
        cause="One part of the model was loaded or cast in another dtype than the rest, a module of yours "
        "makes fp32, or a step runs outside of the autocast it was written for.",
        fix="Load all parts in one dtype (dtype='bfloat16'), cast what you add with .to(model.dtype), or "
        "train with bf16=True (fp16=True), which casts on the way. Let generate run under the dtype "
        "that was trained.",
        example="RuntimeError: expected mat1 and mat2 to have the same dtype, but got: c10::Half != float",
        zh=(
            "一次乘法中出现了两种数据类型：Half 与 Float、BFloat16 与 Float。",
            "模型的一部分以另一种类型载入或转换，自己的模块产生 fp32，或某一步在它所需的 autocast 之外运行。",
            "用同一类型载入所有部分（dtype='bfloat16'），对新增部分调用 .to(model.dtype)，或用 "
            "bf16=True（fp16=True）训练。",
        ),
    ),
    "PH207": Explanation(
        cause="device_map='auto' put layers on several devices and a process per GPU was started on top of "
        "it, or a tensor of yours stayed on the CPU.",
        fix="One of both: under torchrun or accelerate leave device_map out (each process takes its own "
        "GPU); for a model over several GPUs start one process. Move your tensors with "
        ".to(model.device).",
        example="RuntimeError: Expected all tensors to be on the same device, but found at least two devices, "
        "cuda:0 and cuda:1!",
        zh=(
            "一次运算中出现了两个设备的张量（DDP 下，或模型分布在多个设备上）。",
            "device_map='auto' 把各层放到多个设备，同时又为每张 GPU 启动了一个进程；或某个张量留在 CPU 上。",
            "二选一：在 torchrun 或 accelerate 下不要写 device_map（每个进程用自己的 GPU）；模型跨多张 "
            "GPU 时只启动一个进程。用 .to(model.device) 移动自己的张量。",
        ),
    ),
    "PH208": Explanation(
        cause="Dynamic quantisation reads 16-bit weights of plain linear layers, and init_lora_weights='loftq' the "
        "original checkpoint of a 4-bit model; one of them is not there, or the model is a mixture of experts.",
        fix="Load the 16-bit checkpoint, or name it: loftq_config={'original': folder}.",
        example="[PH208] the checkpoint is quantised already, and what that lost cannot be measured. Fix: load it "
        "without dynamic_4bit, or load the 16-bit original with it",
        zh=(
            "该模型（或其加载方式）不能做动态量化，或不能做低秩补偿。",
            "动态量化需要普通线性层的 16 位权重，init_lora_weights='loftq' 需要 4 位模型的原始检查点；其中之一不存在，"
            "或模型是混合专家模型。",
            "加载 16 位检查点，或指明它：loftq_config={'original': 文件夹}。",
        ),
    ),
}
