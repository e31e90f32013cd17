#include "shim_chat.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "allowance.h"
#include "chat-auto-parser.h"
#include "chat.h"
#include "log.h"

using json = common_json;

struct altiplano_chat {
    common_chat_templates_ptr templates;
    // The format is found by comparing renderings of the template, not by its name.
    bool analysed;
};

struct altiplano_chat_reader {
    common_chat_parser_params params;
};

namespace {

// What a small request may cost: below a second. The usual ones cost 1 to 15 MiB.
constexpr uint64_t COST = 128ull << 20;

// What each byte of a request adds; a long conversation needs some 180.
constexpr uint64_t COST_PER_BYTE = 512;

uint64_t cost_of(size_t size) {
    return COST + COST_PER_BYTE * size;
}

// Runs `body` with an allowance; what it throws becomes `failure`.
template <typename Body, typename Result>
Result guarded(uint64_t cost, altiplano_chat_error * error, Result failure, Body body) noexcept {
    const altiplano::allowance allowance(cost, ALTIPLANO_CHAT_STACK);
    try {
        return body();
    } catch (const std::exception & exception) {
        std::snprintf(error->text, sizeof(error->text), "%s", exception.what());
    } catch (...) {
        std::snprintf(error->text, sizeof(error->text), "an exception of an unknown kind");
    }
    return failure;
}

altiplano_text text_of(const std::string & string) {
    char * data = static_cast<char *>(std::malloc(string.size() + 1));
    if (data == nullptr) {
        throw std::bad_alloc();
    }
    std::memcpy(data, string.data(), string.size());
    return { data, string.size() };
}

common_chat_templates_inputs inputs_of(const json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.add_generation_prompt = request.at("add_generation_prompt").get<bool>();
    inputs.continue_final_message = common_chat_continuation_parse(request.at("continue_final_message"));
    inputs.enable_thinking = request.at("enable_thinking").get<bool>();
    inputs.reasoning_format = request.at("parse_reasoning").get<bool>() ? COMMON_REASONING_FORMAT_DEEPSEEK : COMMON_REASONING_FORMAT_NONE;
    inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.at("tool_choice").get<std::string>());
    inputs.parallel_tool_calls = request.at("parallel_tool_calls").get<bool>();
    inputs.force_pure_content = request.at("prompt_only").get<bool>();
    const json & schema = request.at("json_schema");
    if (!schema.is_null()) {
        inputs.json_schema = schema.dump();
    }
    for (const auto & [name, value] : request.at("variables").items()) {
        inputs.chat_template_kwargs[name] = value.dump();
    }
    return inputs;
}

const char * trigger_kind(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:         return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN:      return "pattern";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: return "pattern_full";
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:        break; // made of words by whoever has the vocabulary
    }
    throw std::runtime_error("a trigger of an unknown kind");
}

// Whether llama.cpp has no parser made for this very template.
bool is_analysed(const llama_model * model, const common_chat_template & chat_template) {
    if (model != nullptr && llama_model_chat_template(model, "tool_use") != nullptr) {
        return false;
    }
    autoparser::generation_params params;
    params.messages = json::array();
    params.messages.push_back({ { "role", "user" }, { "content", "Hi" } });
    params.extra_context = json::object();
    params.add_generation_prompt = true;
    try {
        return !common_chat_try_specialized_template(chat_template, chat_template.source(), params).has_value();
    } catch (const std::exception &) {
        return false;
    }
}

json prompt_of(const common_chat_params & params) {
    json triggers = json::array();
    for (const auto & trigger : params.grammar_triggers) {
        triggers.push_back({ { "kind", trigger_kind(trigger.type) }, { "value", trigger.value } });
    }
    return json::object({
        { "prompt", params.prompt },
        { "generation_prompt", params.generation_prompt },
        { "format", static_cast<int32_t>(params.format) },
        { "parser", params.parser },
        { "grammar", params.grammar },
        { "grammar_lazy", params.grammar_lazy },
        { "triggers", triggers },
        { "preserved_tokens", params.preserved_tokens },
        { "additional_stops", params.additional_stops },
        { "supports_thinking", params.supports_thinking },
        { "thinking_start", params.thinking_start_tag },
        { "thinking_ends", params.thinking_end_tags },
    });
}

} // namespace

extern "C" {

void altiplano_text_free(altiplano_text text) {
    std::free(text.data);
}

altiplano_chat * altiplano_chat_new(const llama_model * model, const char * source, const char * bos, const char * eos, altiplano_chat_error * error) {
    // Common's log has a thread and an output of its own; what it says of importance also comes as an exception.
    static std::once_flag silenced;
    std::call_once(silenced, [] { common_log_set_verbosity_thold(-1); });
    const uint64_t cost = cost_of(source != nullptr ? std::strlen(source) : 0);
    return guarded(cost, error, static_cast<altiplano_chat *>(nullptr), [&] {
        const char * text = source != nullptr ? source : llama_model_chat_template(model, nullptr);
        if (text == nullptr) {
            throw std::invalid_argument("there is no chat template");
        }
        // First by itself, for its exception: the function below keeps nothing of it.
        const common_chat_template chat_template(text, bos, eos);
        const bool analysed = is_analysed(model, chat_template);
        auto templates = common_chat_templates_init(model, source != nullptr ? source : "", bos, eos);
        return new altiplano_chat { std::move(templates), analysed };
    });
}

void altiplano_chat_free(altiplano_chat * chat) {
    delete chat;
}

int32_t altiplano_chat_capabilities(const altiplano_chat * chat, altiplano_text * out, altiplano_chat_error * error) {
    return guarded(COST, error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        json capabilities = json::object();
        for (const auto & [name, value] : common_chat_templates_get_caps(chat->templates.get())) {
            capabilities[name] = value;
        }
        capabilities["analysed"] = chat->analysed;
        *out = text_of(capabilities.dump());
        return static_cast<int32_t>(0);
    });
}

int32_t altiplano_chat_apply(const altiplano_chat * chat, const char * request, size_t size, altiplano_text * out, altiplano_chat_error * error) {
    return guarded(cost_of(size), error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        const json body = json::parse(std::string(request, size));
        common_chat_templates_inputs inputs = inputs_of(body);
        common_chat_params params = common_chat_templates_apply(chat->templates.get(), inputs);
        const json & named = body.at("named_tool");
        if (!named.is_null() && !inputs.force_pure_content) {
            // The model reads of all tools, so that the beginning of its prompt stays the same, and can call this one.
            const std::string name = named.get<std::string>();
            std::string prompt = std::move(params.prompt);
            std::vector<common_chat_tool> only;
            for (auto & tool : inputs.tools) {
                if (tool.name == name) {
                    only.push_back(std::move(tool));
                }
            }
            inputs.tools = std::move(only);
            inputs.tool_choice = COMMON_CHAT_TOOL_CHOICE_REQUIRED;
            params = common_chat_templates_apply(chat->templates.get(), inputs);
            params.prompt = std::move(prompt);
        }
        *out = text_of(prompt_of(params).dump_safe());
        return static_cast<int32_t>(0);
    });
}

altiplano_chat_reader * altiplano_chat_reader_new(int32_t format, const char * parser, size_t parser_size, const char * generation_prompt, size_t prompt_size, altiplano_chat_error * error) {
    return guarded(cost_of(parser_size), error, static_cast<altiplano_chat_reader *>(nullptr), [&] {
        auto reader = std::make_unique<altiplano_chat_reader>();
        reader->params.format = static_cast<common_chat_format>(format);
        reader->params.generation_prompt.assign(generation_prompt, prompt_size);
        if (parser_size > 0) {
            reader->params.parser.load(std::string(parser, parser_size));
        }
        return reader.release();
    });
}

void altiplano_chat_reader_free(altiplano_chat_reader * reader) {
    delete reader;
}

int32_t altiplano_chat_read(const altiplano_chat_reader * reader, const char * text, size_t size, bool partial, altiplano_text * out, altiplano_chat_error * error) {
    return guarded(cost_of(size), error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        const common_chat_msg message = common_chat_parse(std::string(text, size), partial, reader->params);
        json calls = json::array();
        for (const auto & call : message.tool_calls) {
            calls.push_back({ { "id", call.id }, { "name", call.name }, { "arguments", call.arguments } });
        }
        const json body = json::object({
            { "content", message.render_content() },
            { "reasoning", message.reasoning_content },
            { "calls", calls },
        });
        *out = text_of(body.dump_safe());
        return static_cast<int32_t>(0);
    });
}

} // extern "C"
