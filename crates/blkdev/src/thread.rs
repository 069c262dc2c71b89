//! [`spawn`]: starts the threads of the libraries. Each has a [`Role`], so that a program can confine it.

use std::{
    cell::Cell,
    io,
    sync::OnceLock,
    thread::{Builder, JoinHandle},
};

/// The work of a thread, which determines the files and system calls that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Moves data to and from devices, and opens queues. It uses open files, sockets and devices only, and may accept connections.
    Worker,
    /// Watches a device that is open.
    Watcher,
    /// Opens a device again.
    Opener,
    /// Serves or reports, on open sockets and files.
    Service,
    /// Does one thing that may block, for the thread that starts it: closes a device, or queries a file system. It has the role of
    /// that thread. If that thread has none, it is a worker.
    Helper,
}

/// Function that confines the calling thread.
pub type Confine = fn(Role);

static CONFINE: OnceLock<Confine> = OnceLock::new();

thread_local! {
    /// The role of this thread. `None`: it was not started by [`spawn`], and has not [entered](enter) one.
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// Makes each thread that [`spawn`] starts from now on call `confine` before its work. Only the first call in a process has an
/// effect.
pub fn confine_with(confine: Confine) {
    let _ = CONFINE.set(confine);
}

/// Gives the calling thread a role, and confines it, unless it has this role already. Does nothing without [`confine_with`].
pub fn enter(role: Role) {
    let Some(confine) = CONFINE.get() else { return };
    if ROLE.get() != Some(role) {
        ROLE.set(Some(role));
        confine(role);
    }
}

/// Starts a thread with a name and a role.
///
/// # Errors
/// As [`Builder::spawn`].
pub fn spawn<T: Send + 'static>(
    role: Role,
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let parent = ROLE.get();
    Builder::new().name(name.into()).spawn(move || {
        // A thread inherits the restrictions of the thread that starts it.
        ROLE.set(parent);
        match (role, parent) {
            (Role::Helper, Some(_)) => {}
            (Role::Helper, None) => enter(Role::Worker),
            (role, _) => enter(role),
        }
        work()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    static SEEN: Mutex<Vec<Role>> = Mutex::new(Vec::new());

    fn seen(work: impl FnOnce() + Send + 'static, role: Role) -> Vec<Role> {
        SEEN.lock().unwrap().clear();
        spawn(role, "test", work).unwrap().join().unwrap();
        SEEN.lock().unwrap().clone()
    }

    /// One test, because the function is the process's.
    #[test]
    fn each_thread_is_confined_before_its_work() {
        // Other tests start threads, too.
        confine_with(|role| {
            if std::thread::current().name() == Some("test") {
                SEEN.lock().unwrap().push(role);
            }
        });
        let nothing = || assert_eq!(SEEN.lock().unwrap().len(), 1);
        assert_eq!(seen(nothing, Role::Service), [Role::Service]);
        assert_eq!(seen(nothing, Role::Helper), [Role::Worker]);
        let child = |role| move || spawn(role, "test", || ()).unwrap().join().unwrap();
        assert_eq!(seen(child(Role::Helper), Role::Opener), [Role::Opener], "a helper has the role of its parent");
        assert_eq!(seen(child(Role::Worker), Role::Worker), [Role::Worker], "restrictions are not doubled");
        assert_eq!(seen(child(Role::Watcher), Role::Opener), [Role::Opener, Role::Watcher]);
    }
}
