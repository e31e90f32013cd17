//! llama.cpp's log: to tracing, and the last errors to whoever asks. The reason of a failed load stands nowhere else.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};

use llama_cpp_sys_2::{
    GGML_LOG_LEVEL_CONT, GGML_LOG_LEVEL_ERROR, GGML_LOG_LEVEL_INFO, GGML_LOG_LEVEL_WARN, ggml_log_level,
};

use super::backend::CUDA_DEVICES;
use super::driver;

/// Lines of errors that are kept for each thread.
const KEPT: usize = 16;

/// Longest line that is kept or logged, in bytes.
const LINE: usize = 1024;

#[derive(Default)]
struct Lines {
    /// A line whose end has not come yet.
    partial: String,
    level: ggml_log_level,
    errors: VecDeque<String>,
}

thread_local! {
    // llama.cpp reports on the thread that called it, so that an error finds its way to the right caller.
    static LINES: RefCell<Lines> = RefCell::default();
}

/// Takes over the log of llama.cpp and ggml, and the text of their assertions.
pub(super) fn install() {
    // SAFETY: the callbacks are functions of this program, which read no user data and never unwind.
    unsafe {
        llama_cpp_sys_2::llama_log_set(Some(on_log), std::ptr::null_mut());
        llama_cpp_sys_2::mtmd_helper_log_set(Some(on_log), std::ptr::null_mut());
        // With a callback ggml does not start a debugger to print a backtrace before it aborts.
        llama_cpp_sys_2::ggml_set_abort_callback(Some(on_abort));
    }
}

/// Runs `body` and returns what it returned, with the errors that llama.cpp logged on this thread meanwhile.
pub(super) fn with_errors<T>(body: impl FnOnce() -> T) -> (T, String) {
    LINES.with_borrow_mut(|lines| lines.errors.clear());
    let result = body();
    let errors = LINES.with_borrow_mut(|lines| lines.errors.drain(..).collect::<Vec<_>>());
    (result, errors.join("; "))
}

unsafe extern "C" fn on_abort(message: *const c_char) {
    if message.is_null() {
        return;
    }
    // SAFETY: ggml passes a string that it has ended with a zero.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    eprintln!("llama.cpp aborts: {}", clip(&text));
}

unsafe extern "C" fn on_log(level: ggml_log_level, text: *const c_char, _user_data: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: ggml passes a string that it has ended with a zero.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    // A thread that ends may have lost its lines already, and a line cannot come from within a line.
    let _ = LINES.try_with(|lines| {
        if let Ok(mut lines) = lines.try_borrow_mut() {
            lines.take(level, &text);
        }
    });
}

impl Lines {
    fn take(&mut self, level: ggml_log_level, text: &str) {
        if level != GGML_LOG_LEVEL_CONT {
            self.flush();
            self.level = level;
        }
        if self.partial.len() < LINE {
            self.partial.push_str(text);
        }
        if text.ends_with('\n') {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let line = clip(self.partial.trim());
        if !line.is_empty() {
            match self.level {
                GGML_LOG_LEVEL_ERROR if is_expected(line) => tracing::debug!(target: "llama.cpp", "{line}"),
                GGML_LOG_LEVEL_ERROR => {
                    tracing::error!(target: "llama.cpp", "{line}");
                    if self.errors.len() == KEPT {
                        self.errors.pop_front();
                    }
                    self.errors.push_back(line.to_owned());
                }
                GGML_LOG_LEVEL_WARN => tracing::warn!(target: "llama.cpp", "{line}"),
                // Some hundred lines for each load: details, not events.
                GGML_LOG_LEVEL_INFO => tracing::debug!(target: "llama.cpp", "{line}"),
                _ => tracing::trace!(target: "llama.cpp", "{line}"),
            }
        }
        self.partial.clear();
    }
}

/// CUDA that finds nothing where it was told that there is nothing, or where there is no driver, which the probe says.
fn is_expected(line: &str) -> bool {
    let is_hidden = || std::env::var_os(CUDA_DEVICES).is_some_and(|devices| devices.is_empty());
    line.contains("failed to initialize CUDA") && (is_hidden() || !driver::has_cuda())
}

fn clip(text: &str) -> &str {
    let mut end = text.len().min(LINE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_whole_lines_of_errors() {
        let mut lines = Lines::default();
        lines.take(GGML_LOG_LEVEL_ERROR, "one ");
        lines.take(GGML_LOG_LEVEL_CONT, "line\n");
        assert_eq!(lines.errors.front().map(String::as_str), Some("one line"));
        lines.take(GGML_LOG_LEVEL_INFO, "not this\n");
        for number in 0..KEPT {
            lines.take(GGML_LOG_LEVEL_ERROR, &format!("error {number}\n"));
        }
        assert_eq!(lines.errors.len(), KEPT);
        assert_eq!(lines.errors.front().map(String::as_str), Some("error 0"));
    }

    #[test]
    fn clips_at_a_character() {
        let text = format!("a{}", "é".repeat(LINE));
        assert_eq!(clip(&text).len(), LINE - 1);
    }
}
