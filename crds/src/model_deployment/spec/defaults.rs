//! Numbers that stand for what was left out.

pub(super) const fn one() -> i32 {
    1
}

pub(super) const fn two() -> i32 {
    2
}

pub(super) const fn four() -> i32 {
    4
}

pub(super) const fn thirty() -> i32 {
    30
}

pub(super) const fn sixty() -> i32 {
    60
}

pub(super) const fn hundred() -> i32 {
    100
}

pub(super) const fn max_queued() -> i32 {
    64
}

pub(super) const fn idle_seconds() -> i32 {
    300
}

pub(super) const fn ten_minutes() -> i32 {
    600
}
