"""PH3xx and PH4xx: data, configuration and commands."""

from __future__ import annotations

from pronghorn.diagnostics.explanations.parts import Explanation

EXPLANATIONS: dict[str, Explanation] = {
    "PH301": Explanation(
        cause="A row lacks a column its kind needs, holds another type there, or is of another kind than the "
        "first rows.",
        fix="Correct the row that is named; `pronghorn data check FILE` lists all of them.",
        example="[PH301] a message has no role (rows.jsonl, line 17). Fix: give each message 'role' and "
        "'content'",
        zh=(
            "数据行种类未知或格式错误。",
            "缺少该种类需要的列、列类型不对，或与前面的行种类不同。",
            "修正报错中指出的行；`pronghorn data check FILE` 会列出全部问题。",
        ),
    ),
    "PH302": Explanation(
        cause="Answers are empty, truncation cut them off, or the template's assistant turns were not found.",
        fix="Raise max_length, or set drop_unsupervised_rows=True to leave such rows out.",
        example="[PH302] 3 of 120 rows have no token to train on, first row 14. Fix: "
        "drop_unsupervised_rows=True leaves them out",
        zh=(
            "没有任何可训练标记的数据行。",
            "回答为空、被截断掉，或没有在模板中找到助手的部分。",
            "增大 max_length，或设 drop_unsupervised_rows=True 略去这些行。",
        ),
    ),
    "PH303": Explanation(
        cause="The chat template rewrites what the assistant said (trims, reorders, drops it), so that its "
        "place in the rendered text cannot be known.",
        fix="Give a template with {% generation %} blocks, or train on all turns: assistant_only_loss=False.",
        example="[PH303] the assistant's turns cannot be told from the rest in what the chat template renders. "
        "Fix: assistant_only_loss=False",
        zh=(
            "无法从聊天模板渲染的结果中区分助手的部分。",
            "聊天模板改写了助手的话（裁剪、重排或丢弃），无法确定其位置。",
            "使用带 {% generation %} 块的模板，或训练所有轮次：assistant_only_loss=False。",
        ),
    ),
    "PH304": Explanation(
        cause="Rows have more tokens than the model's positions, and max_length=None allows no cutting.",
        fix="Set max_length, or rope_scaling for a longer context.",
        example="[PH304] 2 rows are longer than the model's 2,048 positions, the longest has 5,120 tokens. "
        "Fix: set max_length",
        zh=(
            "数据行超出模型上下文，而截断已关闭。",
            "行的标记数超过模型的位置数，且 max_length=None 不允许截断。",
            "设置 max_length，或用 rope_scaling 扩展上下文。",
        ),
    ),
    "PH305": Explanation(
        cause="The data set is empty after filtering, has no length where one is needed, or does not suit an "
        "option.",
        fix="Check the path and the split's name; print(dataset) shows columns and the number of rows.",
        example="[PH305] the train data has no rows. Fix: check the data set and its split",
        zh=(
            "整个数据集无法训练：为空，或与所选选项不符。",
            "过滤后为空、需要长度而没有长度，或不适合某个选项。",
            "检查路径和 split 名称；print(dataset) 会显示列和行数。",
        ),
    ),
    "PH306": Explanation(
        cause="The template was made for another model: its turn markers are plain text to this tokenizer, "
        "or answers end with a token that generation does not stop at.",
        fix="Choose the model's own template (leave the name out), or one whose special tokens the "
        "tokenizer has.",
        example="[PH306] the template 'chatml' writes <|im_start|>, which the tokenizer has not as one token. "
        "Fix: take 'llama-3'",
        zh=(
            "聊天模板写入了分词器没有的标记，或回答不以 EOS 结束。",
            "模板是为另一个模型写的：其轮次标记对该分词器只是普通文本，或回答结尾的标记不会让生成停止。",
            "使用模型自带的模板（不写名称），或选择分词器拥有其特殊标记的模板。",
        ),
    ),
    "PH307": Explanation(
        cause="The rows were tokenised with another tokenizer, tokens were added without resizing the "
        "embedding, or labels hold something else than -100 and token ids. On a GPU it shows as a "
        "device-side assert, long after the place.",
        fix="Tokenise with the model's own tokenizer; model.resize_token_embeddings(len(tokenizer)) after "
        "adding tokens. To see the place: run one step with the model on the CPU.",
        example="IndexError: index out of range in self",
        zh=(
            "标记编号超出模型的词嵌入，或标签超出类别数。",
            "数据由另一个分词器生成、添加标记后没有调整词嵌入，或标签含有 -100 和标记编号以外的值。在 "
            "GPU 上表现为 device-side assert，且远离出错位置。",
            "用模型自己的分词器；添加标记后调用 model.resize_token_embeddings(len(tokenizer))。要看到位"
            "置：把模型放到 CPU 上运行一步。",
        ),
    ),
    "PH310": Explanation(
        cause="The file is no JSON, JSONL, CSV or Parquet, or a column holds numbers in one row and text in "
        "another.",
        fix="`pronghorn data check FILE` names line and field; `pronghorn data clean IN OUT` repairs what "
        "is safe.",
        example="[PH310] line 8 is no JSON: a comma is missing (rows.jsonl, line 8). Fix: correct that line",
        zh=(
            "训练数据存在但无法读取：不是 JSON、列类型混杂，或为空。",
            "文件不是 JSON、JSONL、CSV 或 Parquet，或某列有的行是数字、有的行是文本。",
            "`pronghorn data check FILE` 指出行和字段；`pronghorn data clean IN OUT` 修复可安全修复的部分。",
        ),
    ),
    "PH311": Explanation(
        cause="A scanned PDF without text, an encrypted or truncated file, or a suffix that is none of the "
        "known kinds.",
        fix="Convert it to text, Markdown, HTML, PDF with text, or docx; leave the file out otherwise.",
        example="[PH311] the PDF holds no text, only images (scan.pdf). Fix: run text recognition on it first",
        zh=(
            "用来生成数据的文档种类未知、已损坏或不含文本。",
            "没有文字的扫描 PDF、加密或被截断的文件，或未知的后缀。",
            "转换为文本、Markdown、HTML、带文字的 PDF 或 docx；否则略去该文件。",
        ),
    ),
    "PH312": Explanation(
        cause="The output file holds rows of an earlier call with other documents, another model or other "
        "settings.",
        fix="Choose another output file, or delete the old one to begin anew.",
        example="[PH312] the rows in pairs.jsonl were made with another model (pairs.jsonl). Fix: name another "
        "file",
        zh=(
            "已生成的数据来自与本次不同的文档或设置，会混在一起。",
            "输出文件含有以前用其他文档、模型或设置生成的数据。",
            "换一个输出文件，或删除旧文件重新开始。",
        ),
    ),
    "PH313": Explanation(
        cause="The file is damaged or no picture, the path is wrong from where training runs, an address does not "
        "answer, or Pillow cannot read the format.",
        fix="Check the path of the row that is named, or leave the row out.",
        example="[PH313] an image cannot be opened: 'photos/17.png': No such file or directory (row 2 of the batch). "
        "Fix: check the path or the file; leave the row out where the picture is damaged",
        zh=(
            "数据行中的图像无法打开。",
            "文件损坏或不是图像，从训练所在的位置看路径不对，地址没有响应，或 Pillow 不能读取该格式。",
            "检查报错中指出的行的路径，或略去该行。",
        ),
    ),
    "PH314": Explanation(
        cause="The calibration rows are empty, hold no text, or cannot be read without a tokenizer.",
        fix="Give texts or rows like those that the model will be trained on, or leave calibration out: then "
        "docstrings of Python's library are read.",
        example="[PH314] the calibration data has no rows. Fix: give rows like those that the model will be trained "
        "on; 8,192 tokens are enough",
        zh=(
            "量化要按数据来拟合，但没有数据，或其中没有文本。",
            "校准数据为空、不含文本，或没有分词器而无法读取。",
            "给出与训练数据相似的文本或数据行；或不写 calibration，此时使用 Python 标准库的文档字符串。",
        ),
    ),
    "PH320": Explanation(
        cause="A row has no text or no codes, codes of another codec (their number of codebooks or their range), "
        "floating-point numbers, or a .npy file that is not there.",
        fix="Encode the recordings with the model's own codec, and save [codebooks, frames] of whole numbers with "
        "numpy.save; `pronghorn speech rows MODEL ROWS` checks a file of rows.",
        example="[PH320] the codes have 8 codebooks, the model has 10 (rows.jsonl, line 3). Fix: encode with the "
        "codec of this model",
        zh=(
            "语音模型无法从该文本与码的数据行中学习。",
            "该行缺少文本或码、码来自另一种编解码器（码本数或取值范围不同）、不是整数，或 .npy 文件不存在。",
            "用该模型自己的编解码器编码录音，并用 numpy.save 保存整数数组 [码本, 帧]；"
            "`pronghorn speech rows MODEL ROWS` 可检查数据文件。",
        ),
    ),
    "PH321": Explanation(
        cause="Codecs are packages of their own: snac for Orpheus, the fish-speech package for Fish-Speech.",
        fix="Install the codec that is named, or encode the recordings elsewhere and give rows with 'codes'.",
        example="[PH321] the rows hold audio, and the codec's package snac is not installed. Fix: pip install "
        "'pronghorn[speech]', or give rows with 'codes'",
        zh=(
            "数据行中是音频，而把音频变成码的编解码器不可用。",
            "编解码器是单独的软件包：Orpheus 用 snac，Fish-Speech 用 fish-speech 包。",
            "安装提示的编解码器，或在别处编码录音并在数据行中给出 codes。",
        ),
    ),
    "PH401": Explanation(
        cause="A key that does not exist, a value of another type or out of range, or broken indentation in "
        "the YAML file.",
        fix="Correct the line that is named; the nearest known key is suggested.",
        example="[PH401] unknown key 'lerning_rate' under 'training' (config.yaml, line 12). Fix: did you mean "
        "'learning_rate'?",
        zh=(
            "配置文件有未知的键、类型错误或超出范围的值，或不是 YAML。",
            "键不存在、值类型不对或超出范围，或 YAML 缩进有误。",
            "修正报错中指出的行；会提示最接近的键。",
        ),
    ),
    "PH402": Explanation(
        cause="Two arguments exclude each other, or a file or folder given to the command cannot be used.",
        fix="`pronghorn COMMAND --help` shows what goes together.",
        example="[PH402] --prompt is empty. Fix: give a question",
        zh=(
            "命令的参数不能同时使用，或给出的文件、文件夹无法使用。",
            "两个参数互斥，或文件、文件夹不可用。",
            "`pronghorn COMMAND --help` 说明哪些可以一起使用。",
        ),
    ),
    "PH403": Explanation(
        cause="An optional package is needed for this: bitsandbytes for 4 bits, gguf for GGUF files, …",
        fix="Run the pip command that is named, in the environment this Python belongs to.",
        example="[PH403] load_in_4bit needs the package bitsandbytes. Fix: pip install bitsandbytes",
        zh=(
            "本机没有安装所需的软件包。",
            "需要一个可选包：4 位需要 bitsandbytes，GGUF 文件需要 gguf，等等。",
            "在该 Python 所在的环境中运行提示的 pip 命令。",
        ),
    ),
    "PH404": Explanation(
        cause="A misspelt argument, one of another version of a library, or a value outside of its choices.",
        fix="Take the name or value that is suggested.",
        example="[PH404] from_pretrained has no argument 'load_in_4bits'. Fix: did you mean 'load_in_4bit'?",
        zh=(
            "函数收到了不存在的参数，或取值超出范围。",
            "参数拼写错误、属于库的另一版本，或取值不在选项中。",
            "使用提示的名称或取值。",
        ),
    ),
    "PH405": Explanation(
        cause="The script imports a part of Unsloth that this library does not have: methods of reinforcement "
        "learning, speech, or Unsloth's own internals.",
        fix="Leave the name out, or take the one that is suggested; the message lists what the module has.",
        example="[PH405] unsloth.PatchFastRL has no counterpart in pronghorn. Fix: leave it out; unsloth has "
        "FastLanguageModel, FastModel, ...",
        zh=(
            "以替身方式运行的脚本导入了 Unsloth 的一个名称，而本库没有对应的内容。",
            "脚本用到了本库没有的部分：强化学习方法、语音，或 Unsloth 的内部实现。",
            "去掉该名称，或使用提示的名称；报错会列出该模块提供的名称。",
        ),
    ),
    "PH406": Explanation(
        cause="A method is not built here, or `import unsloth` ran before "
        "`import pronghorn.compat.unsloth` and has changed Transformers and TRL for the whole process.",
        fix="Do what the message names; in a notebook restart the kernel and import pronghorn.compat.unsloth "
        "in the first cell.",
        example="[PH406] unsloth itself is loaded in this process. Fix: start anew, and ask for pronghorn before "
        "anything imports it",
        zh=(
            "以替身方式运行的脚本要求了本库不做的事，或 Unsloth 本身已经载入。",
            "某个方法尚未实现，或在 import pronghorn.compat.unsloth 之前已运行 import "
            "unsloth，它已为整个进程修改了 Transformers 和 TRL。",
            "按报错的提示修改；在 notebook 中重启内核，并在第一个单元格导入 pronghorn.compat.unsloth。",
        ),
    ),
}
