"""PH8xx: answering requests."""

from __future__ import annotations

from pronghorn.diagnostics.explanations.parts import Explanation

EXPLANATIONS: dict[str, Explanation] = {
    "PH801": Explanation(
        cause="The prompt and max_new_tokens together exceed the context the engine was made for, or more tokens than "
        "its cache has room for.",
        fix="Shorten the prompt, lower max_new_tokens, or give the engine a larger max_context or cache_tokens.",
        example="[PH801] a prompt of 8,000 tokens and an answer of 500 exceed the context of 8,192 tokens. Fix: at "
        "most 192 new tokens, or a shorter prompt",
        zh=(
            "提示词与回答的长度超过模型上下文或键值缓存。",
            "提示词与 max_new_tokens 之和超过引擎的上下文长度，或超过缓存能容纳的词元数。",
            "缩短提示词，减小 max_new_tokens，或用更大的 max_context 或 cache_tokens 创建引擎。",
        ),
    ),
    "PH802": Explanation(
        cause="The name is none of the adapters loaded on the model.",
        fix="Use one of the names that the message lists, or load the adapter first (model.load_adapter(path, name)).",
        example="[PH802] there is no adapter named 'marketing'. Fix: one of default, legal",
        zh=(
            "请求指定的适配器不存在。",
            "该名称不是模型上已加载的任何适配器。",
            "使用报错列出的名称之一，或先加载适配器（model.load_adapter(path, name)）。",
        ),
    ),
    "PH803": Explanation(
        cause="A prompt without tokens, or a sampling value that means nothing, such as a negative temperature.",
        fix="The message names the value and its range.",
        example="[PH803] top_p is 1.5. Fix: a number above 0 and up to 1",
        zh=(
            "请求的提示词为空，或采样参数超出范围。",
            "提示词没有词元，或采样参数没有意义，例如负的温度。",
            "报错说明了该参数及其范围。",
        ),
    ),
    "PH804": Explanation(
        cause="The model's family is unknown to the fast path, a module has hooks, or an adapter is of a kind that "
        "only its own module computes (DoRA, several active at once).",
        fix="Use model.generate, which runs Transformers' own code for such a model; or merge the adapter.",
        example="[PH804] the engine cannot run this model: model type 'gpt2' has no family file. Fix: model.generate "
        "of Transformers can",
        zh=(
            "推理引擎无法运行此模型。",
            "快速路径不认识该模型家族、某个模块带有钩子，或适配器只能由其自身模块计算（DoRA、同时启用多个）。",
            "使用 model.generate（此时运行 Transformers 自己的代码），或先合并适配器。",
        ),
    ),
    "PH810": Explanation(
        cause="Another program listens on the port, the address is not this machine's, or --host lets others in while "
        "no token is set: anyone who reaches the port could use the model.",
        fix="Choose another --port (0 takes a free one), set a token in PRONGHORN_TOKEN, or listen on 127.0.0.1 and "
        "reach the server through ssh -L.",
        example="[PH810] 0.0.0.0 can be reached by others, and there is no token. Fix: give one with --token or "
        "PRONGHORN_TOKEN, or listen on 127.0.0.1",
        zh=(
            "服务器无法启动：地址已被占用，或没有令牌而对外开放。",
            "端口已被其他程序占用，地址不属于本机，或 --host 允许他人访问却未设置令牌：能连到该端口的人都可使用模型。",
            "更换 --port（0 表示任选空闲端口），用 PRONGHORN_TOKEN 设置令牌，或只监听 127.0.0.1 并通过 ssh -L 访问。",
        ),
    ),
}
