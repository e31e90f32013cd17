// Turns what C++ throws into an error code with its text. For the shim's own sources, not for Rust.
#pragma once

#include <cstdio>
#include <exception>

#include "shim.h"

namespace altiplano {

inline void say(altiplano_error * error, const char * text) {
    if (error != nullptr) {
        std::snprintf(error->text, sizeof(error->text), "%s", text);
    }
}

// Runs `body`; what it throws becomes `failure`.
template <typename Body, typename Result>
Result guarded(altiplano_error * error, Result failure, Body body) noexcept {
    try {
        return body();
    } catch (const std::exception & exception) {
        say(error, exception.what());
    } catch (...) {
        say(error, "an exception of an unknown kind");
    }
    return failure;
}

} // namespace altiplano
