//! evcxr, in a thread of its own: it gets each cell with what it needs to be honest, and says what came of it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use evcxr::CommandContext;

use crate::api::{Api, Item};
use crate::diagnostics::{self, Failure, FailureKind};
use crate::keep::{self, Replaced};
use crate::layout::{Layout, remedy_for_linker};
use crate::outputs::{self, Forms, Reply};
use crate::scope::{Names, Scope};
use crate::syntax::{self, Binding};
use crate::types::{self, Question, Types};
use crate::{own, plain, supervisor, wrapper};

pub enum Request {
    Execute(String),
    /// Give the variables back that the last cell, which failed, was about to replace.
    Restore,
    /// The type of an expression.
    TypeOf(String, Sender<Option<String>>),
}

/// How long evcxr may take to compile its first line.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// How a session speaks with the thread.
pub struct Handle {
    pub requests: Sender<Request>,
    pub replies: Receiver<Reply>,
    /// Lines that evcxr passes on from the cells.
    pub events: Receiver<String>,
    /// Asks for a line of input: the prompt, and whether it is a password.
    pub questions: Receiver<(String, bool)>,
    pub answers: Sender<String>,
    /// Raised while the running cell is being interrupted.
    pub stopping: Arc<AtomicBool>,
    /// What the cells so far defined.
    pub names: Arc<Mutex<Names>>,
    /// The cells'.
    pub process: Arc<Mutex<Child>>,
}

/// Starts evcxr, which works in `folder`. `api` tells what the library's functions return.
pub fn start(folder: &Path, api: Arc<Api>) -> Result<Handle> {
    let (requests, requested) = bounded(0);
    let (reply, replies) = bounded(1);
    let (started, start) = bounded(1);
    let (ask, questions) = unbounded();
    let (answers, answered) = unbounded();
    let (stopping, names) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Names>>::default());
    let engine = Engine {
        folder: folder.to_owned(),
        question: Question::new(folder),
        replaced: Vec::new(),
        typed: None,
        definitions: HashMap::new(),
        items: Vec::new(),
        api,
        must_set_up_process: true,
        stopping: stopping.clone(),
        names: names.clone(),
        ask,
        answered,
    };
    std::thread::spawn(move || engine.serve(&started, &requested, &reply));
    let (process, events) = match start.recv_timeout(START_TIMEOUT) {
        Ok(started) => started?,
        Err(_) => bail!("evcxr has not started after {} s", START_TIMEOUT.as_secs()),
    };
    Ok(Handle { requests, replies, events, questions, answers, stopping, names, process })
}

/// evcxr and the cells learn all this from the environment.
pub fn prepare_environment(layout: &Layout, toolchain: &Path, folder: &Path) -> Result<()> {
    // rust-analyzer, inside evcxr, needs no standard library here, for rustc infers the types. Left alone it would
    // read all of its sources, and download them where they are missing.
    let no_std = folder.join("no-std");
    std::fs::create_dir_all(no_std.join("core"))?;
    let before = |first: PathBuf, name: &str| {
        let rest = std::env::var_os(name);
        std::env::join_paths([first].into_iter().chain(rest.iter().flat_map(std::env::split_paths)))
    };
    let libraries = before(layout.prefix.join("lib"), "LD_LIBRARY_PATH")?;
    // Past rustup's proxies, which cost more time than compiling a small cell.
    let path = before(toolchain.join("bin"), "PATH")?;
    // The installation may have come here since it was made, or be one that must not be written.
    std::fs::write(folder.join("init.evcxr"), layout.init_evcxr())?;
    // cargo locks its home though cells need nothing from it; where that cannot be written, another does as well.
    let home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let is_writable = |home: PathBuf| tempfile::tempfile_in(home).is_ok();
    let own_home = (!home.is_some_and(is_writable)).then(|| folder.join("cargo"));
    // SAFETY: called before the session's first thread is started.
    unsafe {
        if let Some(home) = own_home {
            std::env::set_var("CARGO_HOME", home);
        }
        std::env::set_var("EVCXR_TMPDIR", folder);
        std::env::set_var("EVCXR_CONFIG_DIR", folder);
        std::env::set_var("RUST_SRC_PATH", no_std);
        std::env::set_var("LD_LIBRARY_PATH", libraries);
        std::env::set_var("PATH", path);
        // evcxr asks rustup first which cargo and rustc it should take.
        std::env::set_var("RUSTUP_TOOLCHAIN", toolchain);
        // Cells are no part of the build that may have started us.
        for name in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_INCREMENTAL"] {
            std::env::remove_var(name);
        }
    }
    Ok(())
}

/// The cells' process, and the lines that evcxr passes on.
type Started = Result<(Arc<Mutex<Child>>, Receiver<String>)>;

/// What the thread in which evcxr lives works with.
struct Engine {
    folder: PathBuf,
    question: Question,
    replaced: Vec<Replaced>,
    typed: Option<String>,
    /// [`syntax::definitions`] of the cells so far.
    definitions: HashMap<String, String>,
    /// What they define.
    items: Vec<Item>,
    /// What the library's functions return.
    api: Arc<Api>,
    /// Whether the process for the cells is a new one.
    must_set_up_process: bool,
    stopping: Arc<AtomicBool>,
    names: Arc<Mutex<Names>>,
    ask: Sender<(String, bool)>,
    answered: Receiver<String>,
}

/// Brings text to the reader that a cell printed without a newline, which would stay in Rust's buffer.
/// (It must not begin with a colon, as evcxr's commands do.)
const FLUSH: &str = "let _ = ::std::thread::spawn(|| loop {
    ::std::thread::sleep(::std::time::Duration::from_millis(50));
    let _ = ::std::io::Write::flush(&mut ::std::io::stdout());
});";

impl Engine {
    /// Starts evcxr, and works off requests until there are no more.
    fn serve(mut self, started: &Sender<Started>, requests: &Receiver<Request>, replies: &Sender<Reply>) {
        let (mut context, outputs) = match self.start() {
            Ok(evcxr) => evcxr,
            Err(error) => {
                let said = error.to_string();
                let _ = started.send(Err(anyhow::anyhow!("{said}{}", remedy_for_linker(&said))));
                return;
            }
        };
        // Nothing writes to evcxr's own stderr channel, for the supervisor sends all as events.
        let _ = started.send(Ok((context.process_handle(), outputs.stdout)));
        for request in requests {
            let before: Vec<String> = context.variables_and_types().map(|(name, _)| name.to_owned()).collect();
            let result = match request {
                Request::Execute(code) => self.execute(&mut context, &code),
                Request::Restore => {
                    // One that could not be cloned is not there to be restored.
                    let replaced = std::mem::take(&mut self.replaced);
                    wrapper::mark(&self.folder, true);
                    replaced.iter().for_each(|variable| drop(context.execute(&variable.restore())));
                    Ok(Forms::new())
                }
                Request::TypeOf(expression, answer) => {
                    let _ = answer.send(self.type_of(&mut context, &expression));
                    continue;
                }
            };
            self.must_set_up_process |= matches!(&result, Err(failure) if failure.kind == FailureKind::Died);
            let now = self.names(&context);
            let lost = before.into_iter().filter(|name| !now.has_variable(name)).collect();
            if let Ok(mut names) = self.names.lock() {
                *names = now;
            }
            let reply =
                Reply { result, compiled: context.last_source().unwrap_or_default(), lost, typed: self.typed.take() };
            if replies.send(reply).is_err() {
                return;
            }
        }
    }

    fn start(&mut self) -> Result<(CommandContext, evcxr::EvalContextOutputs)> {
        let (mut context, outputs) = CommandContext::new().map_err(|e| anyhow::anyhow!("evcxr does not start: {e}"))?;
        std::fs::write(self.folder.join(supervisor::STARTED), "")?;
        let wrapper: PathBuf = std::env::current_exe()?;
        let setup = [
            ":load_config --quiet".to_owned(),
            format!(":build_env RUSTC_WRAPPER={}", wrapper.display()),
            format!(":build_env {}={}", types::ASK_IN, self.folder.display()),
            // evcxr learns from a failed compile that a cell may use `?`: let it learn that once, and here.
            format!("{FLUSH} Ok::<(), String>(())?;"),
            keep::PRELUDE.to_owned(),
            outputs::PRELUDE.to_owned(),
        ];
        wrapper::mark(&self.folder, true);
        for command in setup {
            context.execute(&command).map_err(|e| anyhow::anyhow!("evcxr refuses {command:?}: {e}"))?;
        }
        self.must_set_up_process = false;
        Ok((context, outputs))
    }

    /// Compiles and runs one cell. What it shows comes as events; returned are outputs of evcxr's own commands.
    fn execute(&mut self, context: &mut CommandContext, code: &str) -> Result<Forms, Failure> {
        if std::mem::take(&mut self.must_set_up_process) {
            wrapper::mark(&self.folder, true);
            context.execute(FLUSH).map_err(|error| diagnostics::failure(&error, FLUSH))?;
        }
        if code[..syntax::rust_begins(code)].lines().any(|line| line.split_whitespace().next() == Some(":quit")) {
            let message = "`:quit` would end the notebook's process: restart or shut down the kernel in its place";
            return Err(Failure::new(FailureKind::Compile, message, message));
        }
        self.give_up_outdated(context, code)?;
        // Answers that came too late belong to nobody.
        self.answered.try_iter().for_each(drop);
        let bindings = syntax::bindings(code);
        self.replaced = replaced_by(&bindings, context);
        let (told, is_plain) = self.seen(context, code, &bindings);
        wrapper::mark(&self.folder, is_plain);
        // Types that the index tells cost nothing; to ask rustc takes as long as compiling a small cell. So it is asked
        // for those only that the index does not tell, or tells wrong.
        let was_told = told.is_some();
        let mut prepared = self.prepare(context, code, &bindings, told)?;
        let mut result = self.run(context, &prepared.code);
        if self.is_refused(&result) && was_told {
            prepared = self.prepare(context, code, &bindings, None)?;
            result = self.run(context, &prepared.code);
        }
        if self.is_refused(&result) && prepared.code != code {
            // The cell as it was written makes for better messages. That it could compile after all is no harm.
            result = self.run(context, code);
        }
        self.typed = prepared.typed;
        if !matches!(result, Err(evcxr::Error::CompilationErrors(_))) {
            self.definitions.extend(syntax::definitions(code));
            own::learn(&mut self.items, code);
        }
        let mut contents =
            result.map(|outputs| outputs.content_by_mime_type).map_err(|e| diagnostics::failure(&e, code))?;
        if code.trim() == ":vars" {
            // evcxr's table does not end its rows.
            contents.entry("text/html".into()).and_modify(|html| *html = html.replace("</td><tr>", "</td></tr>"));
        }
        Ok(contents)
    }

    /// Forgets the variables whose type a cell, if it compiles, defines anew. evcxr knows a type by its name and those of
    /// its fields, and would take the memory of a `struct S(i32)` for that of a `struct S(i64)`.
    fn give_up_outdated(&self, context: &mut CommandContext, code: &str) -> Result<(), Failure> {
        let is_new = |(name, text): &(String, String)| self.definitions.get(name).is_some_and(|old| old != text);
        let mut changed: Vec<String> = syntax::definitions(code).filter(is_new).map(|(name, _)| name).collect();
        // And what is made of them.
        while let Some((name, _)) =
            self.definitions.iter().find(|(name, text)| !changed.contains(name) && syntax::mentions(text, &changed))
        {
            changed.push(name.clone());
        }
        let outdated = context.variables_and_types().filter(|(_, ty)| syntax::mentions(ty, &changed));
        let outdated: Vec<String> = outdated.map(|(name, _)| name.to_owned()).collect();
        if outdated.is_empty() {
            return Ok(());
        }
        let errors = context.check(code).map_err(|error| diagnostics::failure(&error, code))?;
        if errors.iter().any(|error| error.level().starts_with("error")) {
            return Err(diagnostics::failure(&evcxr::Error::CompilationErrors(errors), code));
        }
        // A variable that has moved away is none any more.
        let moved =
            |name: &String| format!("let {name}: ::std::string::String = ::std::string::String::new(); drop({name}); ");
        let moved: String = outdated.iter().map(moved).collect();
        let names = outdated.join(", ");
        let note = format!(
            "{moved}::std::eprintln!(\"a type is defined anew, so variables of the old one are gone: {names}\");"
        );
        context.execute(&note).map(drop).map_err(|error| diagnostics::failure(&error, code))
    }

    fn run(&self, context: &mut CommandContext, code: &str) -> Result<evcxr::EvalOutputs, evcxr::Error> {
        let mut callbacks = evcxr::EvalCallbacks {
            input_reader: &|request| {
                let prompt = request.prompt.replace(supervisor::COLON, ":");
                let _ = self.ask.send((prompt, request.is_password));
                self.answered.recv().unwrap_or_default()
            },
        };
        context.execute_with_callbacks(code, &mut callbacks)
    }

    /// Whether a cell does not compile, and not because a compiler was killed.
    fn is_refused(&self, result: &Result<evcxr::EvalOutputs, evcxr::Error>) -> bool {
        matches!(result, Err(evcxr::Error::CompilationErrors(_))) && !self.stopping.load(SeqCst)
    }

    /// What can be told of a cell without compiling it: the types of all its variables, if it does not write them and
    /// the index tells them all; and whether it is [`plain`].
    fn seen(&self, context: &CommandContext, code: &str, bindings: &[Binding]) -> (Option<Types>, bool) {
        let Names { variables, items } = self.names(context);
        let scope = Scope { api: &self.api, variables: &variables, items: &items, ask: &|_| None };
        let is_plain = plain::is_plain(&scope, code);
        if bindings.iter().all(|variable| variable.is_typed) {
            return (None, is_plain);
        }
        let told = scope.variables_of(code);
        let are_all = bindings.iter().all(|variable| variable.is_typed || told.contains_key(&variable.name));
        (are_all.then_some(told), is_plain)
    }

    /// The cell with what it needs to be honest: types, old values kept, and a flush. Types that were not told are asked
    /// for.
    fn prepare(
        &self,
        context: &mut CommandContext,
        code: &str,
        bindings: &[Binding],
        told: Option<Types>,
    ) -> Result<Prepared, Failure> {
        let types = match told {
            Some(told) => told,
            None if bindings.iter().all(|variable| variable.is_typed) => Types::new(),
            None => match self.asked_types(context, code, bindings)? {
                Some(types) => types,
                // A cell with errors goes to evcxr as it is, which reports them.
                None => return Ok(Prepared { code: code.to_owned(), typed: None }),
            },
        };
        let mut prepared = syntax::annotate(code, bindings, &types);
        let keep: String = self.replaced.iter().map(Replaced::keep).collect();
        prepared.insert_str(syntax::rust_begins(code), &keep);
        if !syntax::ends_in_expression(code) {
            // Text without a newline would otherwise stay in the cell's buffer until a later cell prints one.
            prepared.push_str("\nlet _ = ::std::io::Write::flush(&mut ::std::io::stdout());");
        }
        let typed = (!types.is_empty()).then(|| syntax::with_types(code, bindings, &types));
        Ok(Prepared { code: prepared, typed })
    }

    /// The types of a cell's variables, from rustc; None if the cell has errors.
    fn asked_types(
        &self,
        context: &mut CommandContext,
        code: &str,
        bindings: &[Binding],
    ) -> Result<Option<Types>, Failure> {
        let answer = self.question.ask(|| drop(context.check(code)));
        let answer =
            answer.map_err(|e| Failure::new(FailureKind::Compile, "cannot ask rustc for types", &e.to_string()))?;
        let Some(answer) = answer.filter(|answer| !answer.has_errors) else { return Ok(None) };
        let unnamed = bindings.iter().find_map(|variable| {
            let ty = answer.types.get(&variable.name)?;
            Some((&variable.name, types::for_people(ty), types::unnameable(ty)?))
        });
        if let Some((name, ty, reason)) = unnamed {
            let message = format!("the variable `{name}` cannot be kept for later cells: its type is `{ty}`");
            let details = format!(
                "{message}\n{reason}\nor wrap the lines that need `{name}` in {{ }}, so that it ends with them"
            );
            return Err(Failure::new(FailureKind::Compile, &message, &details));
        }
        Ok(Some(answer.types))
    }

    fn names(&self, context: &CommandContext) -> Names {
        let variables = context.variables_and_types().map(|(name, ty)| (name.to_owned(), ty.to_owned()));
        let mut items = self.items.clone();
        let known = |name: &&str| self.items.iter().any(|item| item.path == *name);
        let imports = context.defined_item_names().filter(|name| !known(name));
        let imports = imports.filter(|name| ![keep::PRELUDE_DEFINES, outputs::PRELUDE_DEFINES].contains(name));
        items.extend(imports.map(Item::import));
        Names { variables: variables.collect(), items }
    }

    /// The type of an expression, as rustc writes it.
    fn type_of(&self, context: &mut CommandContext, expression: &str) -> Option<String> {
        const NAME: &str = "qlora_nb_asked";
        let code = format!("let {NAME} = {expression};");
        let answer = self.question.ask(|| drop(context.check(&code))).ok()??;
        answer.types.get(NAME).cloned()
    }
}

/// A cell as evcxr gets it.
struct Prepared {
    /// For evcxr.
    code: String,
    /// For people, with the types of its variables; None if there is nothing to write.
    typed: Option<String>,
}

fn replaced_by(bindings: &[Binding], context: &CommandContext) -> Vec<Replaced> {
    let known = context.variables_and_types();
    let replaced = known.filter(|(name, _)| bindings.iter().any(|variable| variable.name == *name));
    replaced.map(|(name, ty)| Replaced { name: name.to_owned(), ty: ty.to_owned() }).collect()
}
