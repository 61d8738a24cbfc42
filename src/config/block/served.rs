//! A disk that another process serves: `vhost_user`.

use super::{Block, GivenBlock, unknown};
use crate::config::diagnostic::Diagnostic;
use crate::config::section::{Context, Section};
use crate::config::{host_file, image_format};

/// What stands for the format of a disk that another process serves.
pub const VHOST_USER: &str = "vhost-user";

/// The options of such a disk.
const OF_SERVED: [&str; 4] = ["vhost_user", "ro", "root", "queues"];

impl Block {
    /// Whether another process serves it, at the socket `path`: it has no image here.
    pub fn is_served(&self) -> bool {
        self.vhost_user.is_some()
    }

    /// Whether it has this option. A disk that another process serves has few.
    pub(in crate::config) fn has_option(&self, key: &str) -> bool {
        !self.is_served() || OF_SERVED.contains(&key)
    }
}

impl GivenBlock {
    /// What a disk is that another process serves, that process is told.
    pub(super) fn stands_alone(&self, cx: &Context<'_>) {
        for (key, at) in self.written() {
            if OF_SERVED.contains(&key) {
                continue;
            }
            let help = match key {
                "path" | "url" | "build" => {
                    "the image is opened here, or by the process that serves it: remove one of them"
                }
                "id" => "the guest asks the server for it: `launcher disk serve --id ...`",
                _ => "it is for the process that serves the disk: give it there",
            };
            let title = format!("`{key}` is given beside `vhost_user`, expected one of them");
            cx.report(
                Diagnostic::value(Some(at), title)
                    .related(self.vhost_user.at.clone(), "and this")
                    .help(help.to_owned()),
            );
        }
    }

    /// Fills in what follows for a disk that has no image here.
    pub(super) fn resolve_served(mut self, mut section: Section<'_>) -> Option<Block> {
        let cx = section.cx;
        image_format::refuse_tables(&mut section, &self.vhost_user.at);
        unknown(section);
        self.format.value = Some(VHOST_USER.to_owned());
        let folder = host_file::folder(cx, self.vhost_user.at.as_ref());
        self.finish(folder, false, Vec::new())
    }
}
